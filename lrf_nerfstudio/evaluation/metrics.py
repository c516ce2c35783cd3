"""PSNR, SSIM and LPIPS of a picture against a photograph."""

from pathlib import Path

import torch
from nerfstudio.utils.rich_utils import CONSOLE
from pytorch_msssim import ssim
from torch import Tensor

LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"
"""File of torchvision's AlexNet in PyTorch's cache, which LPIPS is computed with; torchmetrics brings the rest."""


class ImageMetrics:
    """Compares pictures with photographs, both [H, W, 3] in [0, 1].

    Args:
        download_lpips: whether the weights of LPIPS may be downloaded. Otherwise LPIPS is computed only where they are
            in PyTorch's cache already; where they are not, that is said once and the metric left out.
    """

    def __init__(self, download_lpips: bool = False):
        self.download_lpips = download_lpips
        self._lpips: torch.nn.Module | None = None
        self._lpips_is_missing = False

    def __call__(self, picture: Tensor, photograph: Tensor, mask: Tensor | None = None) -> dict[str, float]:
        """`psnr`, `ssim` and, where its weights are, `lpips`.

        Args:
            picture: [H, W, 3] in [0, 1].
            photograph: [H, W, 3] in [0, 1].
            mask: [H, W], True where pixels count. PSNR is taken over these alone; for the other two, which look at
                neighbourhoods, the rest is set to black in both.
        """
        squared_error = (picture - photograph).square()
        if mask is not None:
            squared_error = squared_error[mask]
            picture, photograph = picture * mask[..., None], photograph * mask[..., None]
        picture, photograph = (image.permute(2, 0, 1)[None] for image in (picture, photograph))
        metrics = {
            "psnr": float(-10 * torch.log10(squared_error.mean())),
            "ssim": float(ssim(picture, photograph, data_range=1.0)),
        }
        lpips = self._load_lpips(picture.device)
        if lpips is not None:
            with torch.no_grad():
                metrics["lpips"] = float(lpips(picture.clamp(0, 1), photograph.clamp(0, 1)))
        return metrics

    def _load_lpips(self, device: torch.device) -> torch.nn.Module | None:
        if self._lpips is not None or self._lpips_is_missing:
            return self._lpips
        backbone = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE
        try:
            if not (backbone.exists() or self.download_lpips):
                raise FileNotFoundError(f"{backbone} is missing; --pipeline.model.download-lpips True fetches it")
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self._lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
        except (OSError, ImportError) as error:  # URLError is an OSError
            self._lpips_is_missing = True
            CONSOLE.print(f"[yellow]LPIPS is left out: {error}")
        return self._lpips
