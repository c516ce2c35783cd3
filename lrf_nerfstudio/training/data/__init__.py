"""What autoencoders are trained on: crops of pairs of views, and renders of fields beside photographs."""
