"""Pairs that a tiny autoencoder's own encoder made, in place of a field."""

from pathlib import Path

import torch
import torch.nn.functional as F
from shifted_views import textured_picture

from lrf_nerfstudio.training.data.scene_pairs import PairView, ScenePairs
from lrf_nerfstudio.vae import VAE, VAEConfig

STEPS = (50, 100)
"""Snapshots of the pairs; latents of the first are noisier."""


def write_pairs(
    folder: Path,
    source: str,
    kinds: str = "nttntt",
    size: tuple[int, int] = (90, 119),
    masked: bool = False,
    density: int = 1,
) -> ScenePairs:
    """Writes the pairs of a scene.

    Args:
        folder: of the scene.
        source: the autoencoder.
        kinds: t or n, for each view.
        size: (H, W) of the photographs.
        masked: whether the left 40 columns are masked out.
        density: of the grid; the values between latents are interpolated.
    """
    vae: VAE = VAEConfig(source).setup()
    names = {"t": "train", "n": "novel"}
    views = tuple(PairView(f"{i}.png", names[kind], *size, mask=masked) for i, kind in enumerate(kinds))
    channels = vae.latent_channels
    shift, scale = [0.0] * channels, [1.0] * channels
    identity = (f"/data/{folder.name}", source, vae.fingerprint, vae.spatial_factor)
    pairs = ScenePairs(folder, *identity, {"steps": 100}, shift, scale, views, density=density)
    images = [torch.from_numpy(textured_picture(*size, 10 * i)).float() / 255 for i in range(len(kinds))]
    mask = torch.arange(size[1]).expand(size) >= 40 if masked else None
    pairs.write_photographs(0, [(image, mask) for image in images])
    generator = torch.Generator().manual_seed(0)
    for steps, noise in zip(STEPS, (0.1, 0.05), strict=True):
        latents = [vae.encode(image[None])[0] for image in images]
        noisy = [latent + noise * latent.std() * torch.randn(latent.shape, generator=generator) for latent in latents]
        dense = [F.interpolate(latent[None], scale_factor=density, mode="bilinear")[0] for latent in noisy]
        pairs.write_latents(steps, noisy if density == 1 else dense)
    return pairs
