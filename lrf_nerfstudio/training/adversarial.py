"""The adversarial part of an autoencoder's loss (Esser et al. 2021), with two discriminators to choose from."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lrf_nerfstudio.training.perceptual import PretrainedFeatures


class PatchDiscriminator(nn.Module):
    """PatchGAN of pix2pix (Isola et al. 2017): says of overlapping patches whether they are photographs.

    Normalises by groups where the original does by batch, so that pictures of a batch do not influence each other and
    several processes with small batches compute what one process with a large batch does.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        """`channels` of the first layer, doubled in each of the following `layers` up to eightfold."""
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
        """Logits [B, 1, h, w] of patches of images [B, 3, H, W] in [0, 1]; positive: a photograph."""
        return [self.layers(images * 2.0 - 1.0)]


class ProjectedDiscriminator(nn.Module):
    """Says of the features that a frozen, pretrained network sees whether they are those of a photograph.

    After "Projected GANs Converge Faster" (Sauer et al. 2021): a head for each stage of the network, normalised
    spectrally, but without their random projections across stages.
    """

    def __init__(self, features: PretrainedFeatures, width: int = 64) -> None:
        """`features`, on its device already, is neither trained nor saved with the heads of `width` channels."""
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
        """Logits [B, 1, h, w] of each stage for images [B, 3, H, W] in [0, 1]; positive: a photograph."""
        return [head(feature) for head, feature in zip(self.heads, self._features[0](images), strict=True)]


def discriminator_hinge_loss(logits: Sequence[Tensor]) -> Tensor:
    """Hinge loss of the discriminator, a mean over its outputs.

    Args:
        logits: of batches whose first half are photographs, whose second half are decoded images.
    """
    halves = [output.float().chunk(2) for output in logits]
    losses = [0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()) for real, fake in halves]
    return torch.stack(losses).mean()


def generator_loss(logits: Sequence[Tensor]) -> Tensor:
    """Adversarial loss of the decoder: minus the mean logit of decoded images, a mean over the outputs."""
    return -torch.stack([output.float().mean() for output in logits]).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Weight that gives the adversarial loss as much gradient as the reconstruction loss has (Esser et al., eq. 7).

    Args:
        reconstruction: scalar loss.
        adversarial: scalar loss of the generator, :func:`generator_loss`.
        last_layer: weights of the decoder's last layer, where the gradients are compared.

    Returns:
        Scalar without gradient, at most 10,000.
    """
    (g_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (g_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (g_reconstruction.norm() / (g_adversarial.norm() + 1e-4)).clamp(0.0, 1e4).detach()
