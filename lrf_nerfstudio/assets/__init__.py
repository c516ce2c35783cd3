"""Autoencoders that are part of the package, one folder in diffusers format each; see lrf_nerfstudio.vae.VAEConfig."""
