"""Comparison of rendered held-out views with their photographs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lrf_nerfstudio.evaluation.metrics import ImageMetrics
from lrf_nerfstudio.vae import VAE, FieldNormalization


def latent_psnr(latent: Tensor, encoded: Tensor, normalization: FieldNormalization) -> float:
    """Return the PSNR in dB, with data range 1, of rendered against encoded field latents.

    Args:
        latent: [C, h, w], rendered.
        encoded: [C, h, w].
        normalization: latent to field latent.
    """
    error = F.mse_loss(normalization.to_field(latent), normalization.to_field(encoded))
    return float(-10 * torch.log10(error))


@torch.no_grad()
def compare_view(
    rgb: Tensor,
    vae_rgb: Tensor | None,
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
        rgb: [H, W, 3] in [0, 1], the decoded render, as a user sees it.
        vae_rgb: [H, W, 3] in [0, 1], the VAE's picture of the same field, where `rgb` is of the scene's own decoder.
        latent: [C, h, w], the latent that was rendered.
        photograph: [H, W, 3] in [0, 1].
        encoded: [C, h, w], the latent of the photograph.
        mask: [H, W], True where pixels count; None: everywhere.
        vae: reconstructs the photograph.
        normalization: latent to field latent.
        metrics: compares pictures.

    Returns:
        metrics: `psnr, ssim, lpips` of the decoded render against the photograph; `vae_psnr, vae_ssim, vae_lpips` of
            the VAE's picture, if that is another; `latent_psnr` of the rendered against the encoded field latent (data
            range 1); `ceiling_psnr, ceiling_ssim, ceiling_lpips` of the VAE's own reconstruction. LPIPS where its
            weights are.
        picture: side by side, each [H, W, 3], the photograph, the VAE's reconstruction, the VAE's picture of the field,
            if that is another, and the decoded render.
    """
    reconstruction = vae.decode(encoded[None], *photograph.shape[:2])[0]
    values = metrics(rgb, photograph, mask)
    values["latent_psnr"] = latent_psnr(latent, encoded, normalization)
    others = {"ceiling": reconstruction} | ({} if vae_rgb is None else {"vae": vae_rgb})
    for kind, picture in others.items():
        values |= {f"{kind}_{name}": value for name, value in metrics(picture, photograph, mask).items()}
    vae.check_overflow()
    return values, torch.cat([photograph, *others.values(), rgb], dim=1)
