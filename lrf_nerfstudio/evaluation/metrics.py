"""PSNR, SSIM and LPIPS of a picture against a photograph."""

from typing import Literal

import torch
from pytorch_msssim import ssim
from rich.console import Console
from torch import Tensor

from lrf_nerfstudio.utils.lpips import load_lpips


def psnr(picture: Tensor, photograph: Tensor, mask: Tensor | None = None) -> float:
    """Return the PSNR in dB; arguments as in :meth:`ImageMetrics.__call__`."""
    squared_error = (picture - photograph).square()
    if mask is not None:
        squared_error = squared_error[mask]
    return float(-10 * torch.log10(squared_error.mean()))


def psnr_and_ssim(picture: Tensor, photograph: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """`psnr` in dB and `ssim`; arguments as in :meth:`ImageMetrics.__call__`."""
    return {
        "psnr": psnr(picture, photograph, mask),
        "ssim": float(ssim(*_for_neighbourhoods(picture, photograph, mask), data_range=1.0)),
    }


class ImageMetrics:
    """Compares pictures with photographs, both [H, W, 3] in [0, 1].

    Args:
        download_lpips: whether the weights of LPIPS may be downloaded. Otherwise LPIPS is computed only where they are
            in PyTorch's cache already; where they are not, that is said once and the metric left out.
        option: how a user asks for the download.
        network: whose features LPIPS compares; numbers of different networks cannot be compared.
    """

    def __init__(
        self,
        download_lpips: bool = False,
        option: str = "--pipeline.model.download-lpips True",
        network: Literal["alex", "vgg"] = "alex",
    ):
        self.download_lpips, self.option, self.network = download_lpips, option, network
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
        metrics = psnr_and_ssim(picture, photograph, mask)
        lpips = self._load_lpips(picture.device)
        if lpips is not None:
            with torch.no_grad():
                metrics["lpips"] = float(
                    lpips(*_for_neighbourhoods(picture.clamp(0, 1), photograph.clamp(0, 1), mask), normalize=True)
                )
        return metrics

    def _load_lpips(self, device: torch.device) -> torch.nn.Module | None:
        if self._lpips is not None or self._lpips_is_missing:
            return self._lpips
        try:
            self._lpips = load_lpips(self.network, self.download_lpips).to(device)
        except (OSError, ImportError) as error:  # URLError is an OSError
            self._lpips_is_missing = True
            Console().print(f"[yellow]LPIPS is left out: {error}; {self.option} fetches it.")
        return self._lpips


def _for_neighbourhoods(picture: Tensor, photograph: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as [1, 3, H, W], black where pixels do not count."""
    weight = 1 if mask is None else mask[..., None]
    first, second = ((image * weight).permute(2, 0, 1)[None] for image in (picture, photograph))
    return first, second
