"""LPIPS (Zhang et al. 2018) as torchmetrics computes it, when the weights of its backbone are there."""

from pathlib import Path
from typing import Literal

import torch
from torch import nn

_BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
"""Files of torchvision's networks in PyTorch's cache; torchmetrics brings the rest."""


def load_lpips(backbone: Literal["alex", "vgg"], download: bool = False) -> nn.Module:
    """LPIPS as a frozen module; two batches [B, 3, H, W] in [0, 1] and `normalize=True` give [B, 1, 1, 1].

    Differentiable with respect to both batches. Evaluations use `alex`, losses `vgg`.

    Args:
        backbone: the network whose features are compared.
        download: whether its weights may be downloaded where PyTorch's cache lacks them.

    Raises:
        OSError: the weights are not there, or cannot be downloaded.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONES[backbone]
    if not (file.exists() or download):
        raise FileNotFoundError(f"{file} is missing")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type=backbone).net
