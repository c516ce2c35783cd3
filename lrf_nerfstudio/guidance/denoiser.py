"""What score distillation asks of a diffusion model: the noise in a scaled latent."""

from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

PredictionType = Literal["epsilon", "v_prediction"]


class Denoiser(Protocol):
    """A diffusion model of scaled latents, where a latent with noise is `x_t = sqrt(a) x + sqrt(1 - a) noise`.

    Attributes:
        alphas_cumprod: a for each timestep [T], float32, on the device that computes.
    """

    alphas_cumprod: Tensor

    def predict(self, x_t: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        """Return the noise that the model sees.

        Args:
            x_t: [B, C, h, w], scaled latents with noise, float32.
            t: [B], timesteps, int64.
            conditions: [B, L, D], embeddings of prompts.

        Returns:
            [B, C, h, w] float32, without gradients.
        """


class UNetDenoiser:
    """The U-Net of a latent diffusion model, frozen.

    Attributes:
        unet: [B, C, h, w] to [B, C, h, w], in any precision.
        alphas_cumprod: see :class:`Denoiser`.
        prediction_type: what the U-Net predicts: the noise, or v = sqrt(a) noise - sqrt(1 - a) x (Salimans and Ho,
            arXiv 2202.00512, section 4).
    """

    def __init__(
        self, unet: "UNet2DConditionModel", alphas_cumprod: Tensor, prediction_type: PredictionType = "epsilon"
    ) -> None:
        """Take over a U-Net, which is frozen; `alphas_cumprod` [T] is moved to its device."""
        self.unet = unet.eval().requires_grad_(False)
        self.alphas_cumprod = alphas_cumprod.to(unet.device, torch.float32)
        self.prediction_type = prediction_type

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        """See :meth:`Denoiser.predict`; what overflows in half precision is not finite in the result."""
        dtype = self.unet.dtype
        output: Tensor = self.unet(x_t.to(dtype), t, encoder_hidden_states=conditions.to(dtype)).sample.float()
        if self.prediction_type == "epsilon":
            return output
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * output + (1 - alpha).sqrt() * x_t
