"""Training autoencoders: pretraining, stage I and stage III as tasks of one loop."""
