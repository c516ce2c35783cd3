"""One interface for every autoencoder: images in [0, 1] in, latents out, and back.

Example:
    >>> import torch
    >>> from lrf_nerfstudio.vae import VAEConfig
    >>> vae = VAEConfig("lrf-f4c4").setup("cpu")
    >>> vae.latent_channels, vae.spatial_factor
    (4, 4)
    >>> images = torch.rand(1, 33, 50, 3)  # [B, H, W, 3]
    >>> latents = vae.encode(images)  # [B, C, h, w]
    >>> latents.shape
    torch.Size([1, 4, 9, 13])
    >>> vae.decode(latents, height=33, width=50).shape  # [B, H, W, 3]
    torch.Size([1, 33, 50, 3])
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import write_atomically
from lrf_nerfstudio.utils.options import Range
from lrf_nerfstudio.vae.grid import apply_tiled, latent_size, pad_to_multiple, unpad

if TYPE_CHECKING:
    from lrf_nerfstudio.vae.sources import Autoencoder

# Options of the architecture that change what a set of weights computes but not their names and shapes.
_ENCODER_OPTIONS = ("act_fn", "norm_num_groups")
_DECODER_OPTIONS = ("act_fn", "norm_num_groups", "upsample_fn", "upsampling_scaling_factor")


@dataclass
class VAEConfig:
    """Which autoencoder to use, and how."""

    source: str = "lrf-f4c4"
    """The autoencoder: a name in the package's assets, a diffusers folder (AutoencoderKL or AutoencoderTiny, or a
    pipeline with one in `vae/`), a .ckpt or .safetensors file in latent-diffusion layout, or a Hugging Face id; `rgb`
    is none at all: ordinary Gaussian splatting at full resolution, to compare with; `rgb-f4` (f2 to f32) is that at 1/4
    of the resolution, enlarged bicubically."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision that the autoencoder computes in. Its inputs and outputs are float32 in any case."""
    tiling: bool = False
    """Encode and decode pictures larger than a tile in overlapping tiles, which bounds the memory they take."""
    tile_size: Annotated[int, Range(least=64)] = 512
    """Side of a tile in pixels. Neighboring tiles overlap by a quarter of it."""
    slicing: bool = False
    """Encode and decode the pictures of a batch one after the other, which takes less memory."""

    def setup(self, device: str | torch.device = "cpu") -> "VAE":
        """Load the autoencoder onto a device, frozen.

        Raises:
            UserError: the source is not found, not reachable, damaged, unsafe, or no supported autoencoder.
        """
        return VAE.load(self, device)


class VAE(nn.Module):
    """A diffusers AutoencoderKL or AutoencoderTiny behind one interface.

    Attributes:
        autoencoder: the diffusers model; train it like any module.
        latent_channels: C.
        spatial_factor: f, pixels per latent cell and axis.
        scaling_factor: diffusion models see `(latent - shift_factor) * scaling_factor`.
        shift_factor: see `scaling_factor`.
        source: where the autoencoder came from, for messages and checkpoints.
        fingerprint: identifies the latent space: 32 hexadecimal digits that depend on what maps an image to a latent
            (encoder and quant_conv) and on nothing else. Taken from the weights when the object was made, widened to
            float32, so the same weights have the same fingerprint in any file format and with any `dtype` option.
        decoder_fingerprint: the same for what maps a latent to an image.
    """

    overflowed: Tensor

    def __init__(
        self,
        autoencoder: "Autoencoder",
        source: str = "",
        dtype: torch.dtype = torch.float32,
        tiling: bool = False,
        tile_size: int = 512,
        slicing: bool = False,
    ) -> None:
        """Wrap `autoencoder`.

        Args:
            autoencoder: the diffusers model, which is converted to `dtype` in place.
            source: recorded as the attribute of this name.
            dtype: precision of the computation.
            tiling: compute pictures larger than `tile_size` in overlapping tiles.
            tile_size: side of a tile in pixels.
            slicing: compute the pictures of a batch one by one.

        Raises:
            UserError: the encoder and the decoder do not fit each other, or they are not for RGB images.
        """
        super().__init__()
        config = autoencoder.config
        self.source = source
        self.latent_channels: int = config.latent_channels
        self.spatial_factor = _spatial_factor(config, source)
        self.scaling_factor = float(config.scaling_factor)
        self.shift_factor = float(config.shift_factor or 0.0)
        self.dtype = dtype
        self.tiling, self.tile_size, self.slicing = tiling, tile_size, slicing
        self.fingerprint, self.decoder_fingerprint = fingerprints(autoencoder)
        self.autoencoder = autoencoder
        self.register_buffer("overflowed", torch.tensor(False), persistent=False)
        # channels_last is the fastest layout of narrow convolutions on CPUs and of half precision on GPUs.
        self.to(dtype).to(memory_format=torch.channels_last)

    @classmethod
    def load(cls, config: VAEConfig, device: str | torch.device = "cpu") -> "VAE":
        """Load the autoencoder that `config` describes, in evaluation mode and with frozen weights.

        Raises:
            UserError: see :meth:`VAEConfig.setup`.
        """
        from lrf_nerfstudio.vae.sources import load_autoencoder

        vae = cls(
            load_autoencoder(config.source),
            source=config.source,
            dtype=getattr(torch, config.dtype),
            tiling=config.tiling,
            tile_size=config.tile_size,
            slicing=config.slicing,
        )
        return vae.to(device).eval().requires_grad_(False)

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the autoencoder as a diffusers folder that can be a `source`.

        Args:
            folder: where to. The two files of an older autoencoder there are replaced; others stay.
            dtype: precision on disk.

        Raises:
            UserError: the folder cannot be written to, or the disk is full.
        """
        from safetensors.torch import save

        weights = {
            name: weight.detach().to("cpu", dtype if weight.is_floating_point() else None).contiguous()
            for name, weight in self.autoencoder.state_dict().items()
        }
        config = json.loads(self.autoencoder.to_json_string())
        config.pop("_name_or_path", None)  # where this machine loaded it from is nobody else's business
        write_atomically(folder / "diffusion_pytorch_model.safetensors", save(weights, {"format": "pt"}), "--output")
        write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode(), "--output")

    def require_grad_of_decoder(self) -> None:
        """Make the decoder trainable, and what is applied to latents before it; freeze the encoder."""
        for name, part in self.autoencoder.named_children():
            part.requires_grad_(name in ("decoder", "post_quant_conv"))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.overflowed.device

    @property
    def encode_settings(self) -> dict[str, Any]:
        """What latents depend on besides the fingerprint, for the keys of caches: precision and tiling."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "tile_size": self.tile_size if self.tiling else None}

    def encode(self, images: Tensor) -> Tensor:
        """Encode images; differentiable with respect to images and weights.

        Args:
            images: [B, H, W, 3], RGB in [0, 1], any size; moved to the autoencoder's device.

        Returns:
            [B, C, h, w] float32, the posterior mode, unscaled; (h, w) = (ceil(H / f), ceil(W / f)). What float16 does
            not suffice for is found by :meth:`check_overflow`.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be [B, H, W, 3], got {tuple(images.shape)}")
        x = images.to(self.device, torch.float32).permute(0, 3, 1, 2) * 2.0 - 1.0
        x = pad_to_multiple(x, self.spatial_factor).contiguous(memory_format=torch.channels_last)
        return self._run(self._encode, x, in_samples=self.spatial_factor, out_samples=1)

    def decode(self, latents: Tensor, height: int, width: int, clamp: bool = True) -> Tensor:
        """Decode latents to images of the size asked for; differentiable with respect to latents and weights.

        Args:
            latents: [B, C, h, w], unscaled; moved to the autoencoder's device.
            height: H in pixels, with ceil(H / f) = h.
            width: W in pixels, with ceil(W / f) = w.
            clamp: limit the result to [0, 1]; without, gradients survive outside this range.

        Returns:
            [B, H, W, 3] float32 RGB. What float16 does not suffice for is found by :meth:`check_overflow`.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents must be [B, {self.latent_channels}, h, w], got {tuple(latents.shape)}")
        if tuple(latents.shape[-2:]) != latent_size(height, width, self.spatial_factor):
            raise ValueError(
                f"latents of {latents.shape[-2]} x {latents.shape[-1]} cells of {self.spatial_factor} px "
                f"cannot be an image of {height} x {width}"
            )
        z = latents.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
        images = self._run(self._decode, z, in_samples=1, out_samples=self.spatial_factor)
        images = unpad(images, height, width).permute(0, 2, 3, 1) * 0.5 + 0.5
        return images.clamp(0.0, 1.0) if clamp else images

    def check_overflow(self) -> None:
        """Check that float16 has sufficed for everything that was encoded and decoded so far.

        It waits for the device, so it is for those who read results; other precisions are not looked at.

        Raises:
            UserError: a result had infinite numbers or NaN.
        """
        if self.dtype == torch.float16 and bool(self.overflowed):
            self.overflowed = torch.zeros_like(self.overflowed)
            raise UserError(
                f"The VAE {self.source!r} overflows in float16; set --pipeline.vae.dtype to bfloat16 or float32."
            )

    def scale(self, latents: Tensor) -> Tensor:
        """Map latents to scaled latents, what diffusion models see: `(latent - shift_factor) * scaling_factor`."""
        return (latents - self.shift_factor) * self.scaling_factor

    def unscale(self, scaled: Tensor) -> Tensor:
        """Map scaled latents to latents, the inverse of :meth:`scale`."""
        return scaled / self.scaling_factor + self.shift_factor

    def _encode(self, x: Tensor) -> Tensor:
        output = self.autoencoder.encode(x.to(self.dtype))
        latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
        return latents.float()

    def _decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z.to(self.dtype)).sample.float()

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor, in_samples: int, out_samples: int) -> Tensor:
        """Apply `function` with slicing and tiling as configured, and note where float16 does not suffice."""

        def per_batch(batch: Tensor) -> Tensor:
            if not self.tiling:
                return function(batch)
            tile = max(self.tile_size // self.spatial_factor, 2)
            return apply_tiled(function, batch, tile, tile // 4, in_samples, out_samples)

        result = torch.cat([per_batch(part) for part in x.split(1)]) if self.slicing else per_batch(x)
        if self.dtype == torch.float16:
            with torch.no_grad():
                self.overflowed = self.overflowed | ~torch.isfinite(result).all()
        return result


def _spatial_factor(config: Any, source: str) -> int:
    """Return the pixels per latent cell and axis, from a diffusers configuration."""
    if hasattr(config, "encoder_block_out_channels"):  # AutoencoderTiny
        factor = 2 ** (len(config.encoder_block_out_channels) - 1)
        enlargement = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
    else:
        factor = enlargement = 2 ** (len(config.block_out_channels) - 1)
    if factor != enlargement:
        raise UserError(
            f"The VAE {source!r} (--pipeline.vae.source) shrinks by {factor} but enlarges by {enlargement}."
        )
    if config.in_channels != 3 or config.out_channels != 3:
        raise UserError(f"The VAE {source!r} (--pipeline.vae.source) is not for RGB images.")
    return factor


def fingerprints(autoencoder: "Autoencoder") -> tuple[str, str]:
    """Identify the two halves of an autoencoder by content.

    Returns:
        (encoder, decoder), 32 hexadecimal digits each: SHA-256 of the class, of the options that change the computation
        but not the weights, and of all weights of that half as float32, by name.
    """
    modules = dict(autoencoder.named_children())
    config = {"class": type(autoencoder).__name__, **autoencoder.config}

    def digest(parts: tuple[str, ...], options: tuple[str, ...]) -> str:
        header = {name: config.get(name) for name in ("class", *options)}
        return _digest(header, {part: modules[part] for part in parts if part in modules})

    return digest(("encoder", "quant_conv"), _ENCODER_OPTIONS), digest(("decoder", "post_quant_conv"), _DECODER_OPTIONS)


def _digest(header: dict[str, Any], modules: dict[str, nn.Module]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for prefix, module in modules.items():
        for name, weight in sorted(module.state_dict().items()):
            digest.update(f"{prefix}.{name}{tuple(weight.shape)}".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
