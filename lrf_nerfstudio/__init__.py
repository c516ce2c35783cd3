"""Latent radiance fields for nerfstudio: 3D Gaussian splatting in the latent space of a VAE."""
