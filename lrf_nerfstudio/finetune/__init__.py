"""Tuning an autoencoder for radiance fields: crops of corresponding views, losses, and the training loop."""
