"""Distances of images as networks trained on photographs see them: of features by name, and LPIPS."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrf_nerfstudio.training.config import TrainingConfig
from lrf_nerfstudio.training.imagenet import ImageNetFeatures
from lrf_nerfstudio.utils.lpips import load_lpips


def feature_distance(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Return the distance of two lists of features, between 0 and 4: LPIPS (Zhang et al. 2018) without calibration.

    The mean over positions and stages of the squared distance between feature vectors of unit length.
    """
    distances = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(dim=1).mean()
        for a, b in zip(first, second, strict=True)
    ]
    return torch.stack(distances).mean()


class PerceptualLosses:
    """The perceptual terms of a loss: those with a weight above 0 whose network is there.

    Attributes:
        weights: of the terms, by name.
        notices: what the user should know about the terms that are left out.
    """

    def __init__(self, config: TrainingConfig) -> None:
        """Load the networks of the terms whose weights in `config` are above 0.

        Raises:
            UserError: if there is no network of the name `config.feature_network`.
        """
        self._features: ImageNetFeatures | None = None
        self._lpips: nn.Module | None = None
        self.weights: dict[str, float] = {}
        self.notices: tuple[str, ...] = ()
        if config.feature_weight > 0:
            try:
                self._features = ImageNetFeatures(config.feature_network, config.download_weights)
                self.weights["features"] = config.feature_weight
            except OSError as error:
                self.notices += (_left_out("The feature loss", error),)
        if config.lpips_weight > 0:
            try:
                self._lpips = load_lpips("vgg", config.download_weights)
                self.weights["lpips"] = config.lpips_weight
            except (OSError, ImportError) as error:
                self.notices += (_left_out("LPIPS", error),)

    def to(self, device: torch.device) -> None:
        """Move the networks to a device."""
        for network in (self._features, self._lpips):
            if network is not None:
                network.to(device)

    def __call__(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Return the terms, scalars by name, for two batches [B, H, W, 3] in [0, 1]."""
        decoded, images = decoded.permute(0, 3, 1, 2), images.permute(0, 3, 1, 2)
        terms = {}
        if self._features is not None:
            with torch.no_grad():
                expected = self._features(images)
            terms["features"] = feature_distance(self._features(decoded), expected)
        if self._lpips is not None:
            terms["lpips"] = self._lpips(decoded, images, normalize=True).float().mean()
        return terms


def _left_out(loss: str, error: Exception) -> str:
    return f"{loss} is left out: {error}; --download-weights fetches it."
