"""The adversarial part of an autoencoder's loss (Esser et al. 2021), with two discriminators to choose from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lrf_nerfstudio.training.config import TrainingConfig
from lrf_nerfstudio.training.imagenet import ImageNetFeatures
from lrf_nerfstudio.utils.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


class PatchDiscriminator(nn.Module):
    """Tells photographs from decoded images, patch by patch: PatchGAN of pix2pix (Isola et al. 2017).

    Normalizes by groups where the original normalizes by batch, so that images of a batch do not influence each other
    and several processes with small batches compute what one process with a large batch computes.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        """Initialize the weights.

        Args:
            channels: of the first layer.
            layers: how many layers follow, each with twice the channels of the one before, up to 8 times `channels`.
        """
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            previous, width = width, channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            blocks += [
                nn.Conv2d(previous, width, 4, stride, padding=1, bias=False),
                nn.GroupNorm(8, width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return logits [B, 1, h, w] for the patches of images [B, 3, H, W] in [0, 1]; positive means photograph."""
        return [self.layers(images * 2.0 - 1.0)]


class ProjectedDiscriminator(nn.Module):
    """Tells photographs from decoded images by the features that a frozen, pretrained network computes of them.

    After "Projected GANs Converge Faster" (Sauer et al. 2021): one head for each stage of the network, with spectral
    normalization, but without the paper's random projections across stages.
    """

    def __init__(self, features: ImageNetFeatures, width: int = 64) -> None:
        """Initialize the heads.

        Args:
            features: the pretrained network, on its device already; it is neither trained nor saved with the heads.
            width: channels of the heads.
        """
        super().__init__()
        self._features = (features,)  # in a tuple, which hides it from nn.Module
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(channels, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 4, stride=2, padding=1)),
                nn.GroupNorm(8, width),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, 1, 3, padding=1)),
            )
            for channels in features.channels
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return logits [B, 1, h, w] of each stage for images [B, 3, H, W] in [0, 1]; positive means photograph."""
        return [head(feature) for head, feature in zip(self.heads, self._features[0](images), strict=True)]


def discriminator_hinge_loss(logits: Sequence[Tensor]) -> Tensor:
    """Return the hinge loss of the discriminator, a mean over its outputs.

    Args:
        logits: outputs for a batch whose first half is photographs and whose second half is decoded images.
    """
    halves = [output.float().chunk(2) for output in logits]
    losses = [0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()) for real, fake in halves]
    return torch.stack(losses).mean()


def generator_loss(logits: Sequence[Tensor]) -> Tensor:
    """Return the adversarial loss of the decoder: minus the mean logit of decoded images, a mean over the outputs."""
    return -torch.stack([output.float().mean() for output in logits]).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return the weight that gives the adversarial loss as much gradient as the reconstruction loss has.

    Equation 7 of "Taming Transformers for High-Resolution Image Synthesis" (Esser et al. 2021).

    Args:
        reconstruction: scalar loss.
        adversarial: scalar loss of the decoder, :func:`generator_loss`.
        last_layer: weights of the decoder's last layer, where the gradients are compared.

    Returns:
        Scalar without gradient, at most 10,000.
    """
    (g_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (g_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (g_reconstruction.norm() / (g_adversarial.norm() + 1e-4)).clamp(0.0, 1e4).detach()


class Adversary:
    """The discriminator while it trains, and the loss through which it trains the decoder.

    Attributes:
        network: the discriminator, wrapped for several processes and mixed precision.
    """

    def __init__(self, config: TrainingConfig, accelerator: "Accelerator", last_layer: Tensor) -> None:
        """Make the discriminator that the options ask for, on accelerate's device.

        Args:
            config: the options.
            accelerator: of the training.
            last_layer: weights of the decoder's last layer.

        Raises:
            UserError: if the weights of the projected discriminator's network are missing.
        """
        self._accelerator, self._weight, self._last_layer = accelerator, config.gan_weight, last_layer
        device = accelerator.device
        self._plain_network = _make_discriminator(config, device).to(device)
        optimizer = torch.optim.AdamW(
            self._plain_network.parameters(),
            lr=config.gan_learning_rate,
            betas=config.betas,
            weight_decay=0.0,
            fused=device.type == "cuda",
        )
        self.network, self._optimizer = accelerator.prepare(self._plain_network, optimizer)

    def decoder_loss(self, decoded: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the weighted adversarial loss of the decoder.

        Args:
            decoded: [N, H, W, 3].
            reconstruction: the reconstruction loss, a scalar that the adversarial loss is balanced with.
        """
        self._plain_network.requires_grad_(False)
        with self._accelerator.autocast():
            adversarial = generator_loss(self._plain_network(decoded.permute(0, 3, 1, 2)))
        self._plain_network.requires_grad_(True)
        return self._weight * adaptive_weight(reconstruction, adversarial, self._last_layer) * adversarial

    def train_on(self, images: Tensor, decoded: Tensor) -> Tensor:
        """Train the discriminator on photographs and decoded images, [N, H, W, 3] each; return its loss, a scalar."""
        both = torch.cat([images, decoded.detach()]).permute(0, 3, 1, 2)
        with self._accelerator.autocast():
            logits = self.network(both)
        loss = discriminator_hinge_loss(logits)
        self._accelerator.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the discriminator and of its optimizer."""
        return {
            "discriminator": self._plain_network.state_dict(),
            "discriminator optimizer": self._optimizer.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._plain_network.load_state_dict(state["discriminator"])
        self._optimizer.optimizer.load_state_dict(state["discriminator optimizer"])


def _make_discriminator(config: TrainingConfig, device: torch.device) -> nn.Module:
    if config.discriminator == "patch":
        return PatchDiscriminator()
    try:
        features = ImageNetFeatures(config.feature_network, config.download_weights)
    except OSError as error:
        raise UserError(
            f"--discriminator projected judges features of {config.feature_network}, whose weights are not there: "
            f"{error}. Allow their download with --download-weights, or choose --discriminator patch."
        ) from error
    return ProjectedDiscriminator(features.to(device))
