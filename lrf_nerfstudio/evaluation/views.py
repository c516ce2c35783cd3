"""Comparison of rendered held-out views with their photographs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lrf_nerfstudio.evaluation.metrics import ImageMetrics
from lrf_nerfstudio.vae import VAE, FieldNormalization


@torch.no_grad()
def compare_view(
    rgb: Tensor,
    latent: Tensor,
    photograph: Tensor,
    encoded: Tensor,
    mask: Tensor | None,
    *,
    vae: VAE,
    normalization: FieldNormalization,
    metrics: ImageMetrics,
) -> tuple[dict[str, float], Tensor]:
    """Compare a rendered view with its photograph, in three families of metrics.

    Args:
        rgb: [H, W, 3] in [0, 1], the decoded render.
        latent: [C, h, w], the latent that was rendered.
        photograph: [H, W, 3] in [0, 1].
        encoded: [C, h, w], the latent of the photograph.
        mask: [H, W], True where pixels count; None: everywhere.
        vae: reconstructs the photograph.
        normalization: latent to field latent.
        metrics: compares pictures.

    Returns:
        metrics: `psnr, ssim, lpips` of the decoded render against the photograph; `latent_psnr` of the rendered against
            the encoded field latent (data range 1); `ceiling_psnr, ceiling_ssim, ceiling_lpips` of the VAE's own
            reconstruction. LPIPS where its weights are.
        picture: [H, 3 W, 3], side by side the photograph, the VAE's reconstruction and the decoded render.
    """
    reconstruction = vae.decode(encoded[None], *photograph.shape[:2])[0]
    error = F.mse_loss(normalization.to_field(latent), normalization.to_field(encoded))
    values = metrics(rgb, photograph, mask)
    values["latent_psnr"] = float(-10 * torch.log10(error))
    ceiling = metrics(reconstruction, photograph, mask)
    values |= {f"ceiling_{name}": value for name, value in ceiling.items()}
    return values, torch.cat([photograph, reconstruction, rgb], dim=1)
