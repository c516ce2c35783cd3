"""What the training loop needs to know of a training: the autoencoder, the data, the losses."""

import functools
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lrf_nerfstudio.vae import VAE


@dataclass
class Losses:
    """What a task computes from a batch.

    Attributes:
        terms: scalars by name, unweighted; at least one.
        weights: weights by the same names; the loss is the weighted sum.
        images: [N, H, W, 3] in [0, 1], photographs, to be shown and for the discriminator to compare with.
        decoded: [N, H, W, 3], what the decoder made of them, not clamped.
    """

    terms: dict[str, Tensor]
    weights: dict[str, float]
    images: Tensor
    decoded: Tensor

    def total(self, names: tuple[str, ...] | None = None) -> Tensor:
        """Return the weighted sum of the named terms, or of all of them."""
        chosen = self.terms if names is None else names
        return functools.reduce(operator.add, (self.weights[name] * self.terms[name] for name in chosen))


class Task(ABC):
    """What is trained, on what, with which losses.

    A step must not read any value back from the device: `losses` computes with tensors alone.

    Attributes:
        vae: the autoencoder that is trained, or to whose latents the training belongs.
        network: the module that `losses` calls; it holds all parameters that are trained, of the autoencoder if that is
            tuned.
        dataset: an endless series of dictionaries of tensors; item n depends on n alone.
        reconstruction_terms: names of the losses whose gradient the adversarial loss is balanced with.
        notices: what the user should know about the run; printed once when it begins.
    """

    vae: VAE
    network: nn.Module
    dataset: Dataset[dict[str, Tensor]]
    reconstruction_terms: tuple[str, ...]
    notices: tuple[str, ...] = ()

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move everything that belongs to the task, besides `network`, to a device."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: dict[str, Tensor]) -> Losses:
        """Compute the losses of a batch.

        Args:
            network: `network`, wrapped for several processes and mixed precision.
            batch: items of `dataset`, stacked, on the device.
        """

    @abstractmethod
    def pictures(self, batch: dict[str, Tensor], losses: Losses) -> Tensor:
        """Return a picture [3, H, W] in [0, 1] that shows what is decoded beside the photographs."""

    @property
    def last_layer(self) -> Tensor:
        """Weights of the last layer of what decodes, by whose gradients the adversarial loss is balanced."""
        return [module for module in self.vae.autoencoder.decoder.modules() if isinstance(module, nn.Conv2d)][-1].weight

    def save(self, output: Path) -> None:
        """Write what was trained into a folder; the weights are the moving average while this runs.

        Raises:
            UserError: if a file cannot be written.
        """
        self.vae.save(output, dtype=torch.float32)

    def complete(self) -> None:  # noqa: B027 (most tasks need none)
        """Set what follows from the weights, such as the latents' scale; called before they are written.

        The weights are the moving average while this runs.
        """

    def evaluate(self) -> dict[str, float]:
        """Return measures of the moving average by name; called after each checkpoint, in the main process alone."""
        return {}
