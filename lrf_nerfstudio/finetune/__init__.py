"""Tuning an autoencoder for radiance fields: pairs of crops, pairs of latents and photographs, losses, and the loop."""
