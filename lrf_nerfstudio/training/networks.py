"""Forward passes of autoencoders as modules of one call, which is what training on several processes needs."""

import torch
from torch import Tensor, nn

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, sample_latents


class EncodeDecode(nn.Module):
    """Encodes images and decodes their latents."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.autoencoder, self.factor = vae.autoencoder, vae.spatial_factor

    def forward(
        self, images: Tensor, noise: Tensor | None = None, to_other: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode images and decode them from their latents or, where two crops overlap, from those of the other crop.

        Args:
            images: [N, H, W, 3] in [0, 1], sides multiples of the spatial factor.
            noise: [N, C, h, w] standard normal; the latents that are decoded are sampled from the posterior with it.
                None decodes the posterior mode. Autoencoders without a posterior take None.
            to_other: [N, 3], see :class:`~lrf_nerfstudio.training.data.pair_crops.PairCrops`: where the pixels of each
                crop lie in the other crop of its pair; the images 2 n and 2 n + 1 are a pair. None decodes each image
                from its own latents.

        Returns:
            The latents (posterior mode) [N, C, h, w]; the posterior's log variance [N, C, h, w], or None; the decoded
            images [N, H, W, 3], not clamped.
        """
        x = (images * 2.0 - 1.0).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        output = self.autoencoder.encode(x)
        if hasattr(output, "latent_dist"):
            latents, logvar = output.latent_dist.mean, output.latent_dist.logvar
            z = latents if noise is None else latents + (0.5 * logvar).exp() * noise
        else:
            latents, logvar, z = output.latents, None, output.latents
        if to_other is not None:
            z = exchange(z.float(), to_other, self.factor).to(z)
        return latents, logvar, self.autoencoder.decode(z).sample.permute(0, 2, 3, 1) * 0.5 + 0.5


def exchange(z: Tensor, to_other: Tensor, factor: int) -> Tensor:
    """Replace the cells that the other crop of a pair covers by the other crop's latents, resampled.

    Args:
        z: [N, C, h, w], latents of N / 2 pairs of crops, the crops of a pair one after the other.
        to_other: [N, 3], scale and offset (x, y) from pixels of each crop to pixels of the other; NaN: not covered.
        factor: pixels per cell and axis.

    Returns:
        [N, C, h, w].
    """
    height, width = z.shape[-2:]
    rows = torch.arange(height, device=z.device, dtype=z.dtype)
    columns = torch.arange(width, device=z.device, dtype=z.dtype)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centers = (torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * factor  # [h w, 2], (x, y) in pixels
    points = to_other[:, None, :1] * centers + to_other[:, None, 1:]  # [N, h w, 2]
    # Cells next to the edge of the other crop are left out: the encoder saw less around them. NaN compares as false.
    covered = (points > factor).all(dim=-1)
    covered &= (points[..., 0] < (width - 1) * factor) & (points[..., 1] < (height - 1) * factor)  # [N, h w]
    other = z.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # [N, C, h, w], each pair swapped
    resampled = sample_latents(other, torch.nan_to_num(points), factor, "bicubic")  # [N, h w, C]
    own = z.flatten(2).transpose(1, 2)  # [N, h w, C]
    return torch.where(covered[..., None], resampled, own).transpose(1, 2).reshape(z.shape)


class Decode(nn.Module):
    """Decodes latents."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.autoencoder = vae.autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to images [B, h f, w f, 3], not clamped."""
        z = latents.contiguous(memory_format=torch.channels_last)
        return self.autoencoder.decode(z).sample.permute(0, 2, 3, 1) * 0.5 + 0.5


def check_crop(crop: int, vae: VAE) -> None:
    """Check that a square of so many pixels is a grid of at least 4 x 4 latent cells.

    Raises:
        UserError: if it is not.
    """
    factor = vae.spatial_factor
    if crop % factor or crop < 4 * factor:
        raise UserError(
            f"--crop {crop} must be a multiple of {factor}, the spatial factor of {vae.source}, and at least "
            f"{4 * factor}."
        )
