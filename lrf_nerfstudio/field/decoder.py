"""The scene's own decoder: a small network that turns field latents on a dense grid into a picture.

It is fitted to the photographs of one scene together with the field, works at the resolution of a grid and enlarges at
the very end, as ESPCN (Shi et al. 2016) and EDSR (Lim et al. 2017) do for super-resolution.

The field is rendered once, on the dense grid. It has 2 x 2 cells in the place of each cell of the decoder's grid, and
k x k in the place of each latent pixel of the VAE (k is `SceneDecoder.density`). The means of these k x k are the field
latents that the VAE's decoder takes.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae.grid import latent_size
from lrf_nerfstudio.vae.maps import FieldNormalization, LinearRGB

PHASES = 2
"""Dense cells in the place of a cell of the decoder's grid, along each axis."""

MIN_DILATION = 0.05
"""Square dense cells that are added to the covariance of every projected Gaussian at least."""


def mean_of_cells(dense: Tensor, cells: int) -> Tensor:
    """Return [h, w, C], the means of `cells` x `cells` (k) neighbors of a dense grid [h k, w k, C]."""
    rows, columns, channels = dense.shape
    return dense.view(rows // cells, cells, columns // cells, cells, channels).mean(dim=(1, 3))


def dense_dilation(dilation: float, density: int) -> float:
    """Return the dilation of a dense grid with which its means are as sharp as the VAE's grid with `dilation`.

    Taking the mean of k x k cells blurs by the variance of their centers, (k^2 - 1) / 12 square dense cells.

    Args:
        dilation: in square latent pixels.
        density: k, dense cells in the place of a latent pixel, along each axis.

    Returns:
        In square dense cells; where k is more than 1, not less than `MIN_DILATION`, below which Gaussians would fall
        between the cells.
    """
    return dilation if density == 1 else max(dilation * density**2 - (density**2 - 1) / 12, MIN_DILATION)


class Window(NamedTuple):
    """A rectangle of a decoder's grid, in cells; `bottom` and `right` are the first row and column beyond it."""

    top: int
    left: int
    bottom: int
    right: int

    def grown(self, margin: int, rows: int, columns: int) -> "Window":
        """Return this window with `margin` cells more on each side, as far as a grid of `rows` x `columns` reaches."""
        return Window(
            max(self.top - margin, 0),
            max(self.left - margin, 0),
            min(self.bottom + margin, rows),
            min(self.right + margin, columns),
        )

    def slices(self, samples: int, origin: "Window | None" = None) -> tuple[slice, slice]:
        """Return the rows and columns that are this window.

        Args:
            samples: of the array to be cut per cell and axis: `PHASES` for dense cells, `cell` for pixels.
            origin: the window that the array covers; the whole grid if none.
        """
        top, left = (0, 0) if origin is None else origin[:2]
        return (
            slice(samples * (self.top - top), samples * (self.bottom - top)),
            slice(samples * (self.left - left), samples * (self.right - left)),
        )


def windows(rows: int, columns: int, side: int) -> Iterator[Window]:
    """Yield windows of at most `side` x `side` cells that cover a grid without overlap."""
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            yield Window(top, left, min(top + side, rows), min(left + side, columns))


def random_window(rows: int, columns: int, side: int, generator: random.Random) -> Window:
    """Return a window of `side` x `side` cells at a random place, or of as many as the grid has."""
    height, width = min(side, rows), min(side, columns)
    top, left = generator.randint(0, rows - height), generator.randint(0, columns - width)
    return Window(top, left, top + height, left + width)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class SceneDecoder(nn.Module):
    """Field latents on the dense grid to RGB.

    The picture is a linear map of the cells of the decoder's grid, enlarged bilinearly, plus what the network adds: a
    3 x 3 convolution of these cells (means of 2 x 2 dense ones) and of the three differences between the dense ones
    (horizontal, vertical, diagonal), residual blocks, a 3 x 3 convolution to 3 cell^2 channels, and a pixel shuffle.
    The last convolution starts at zero, so that fitting starts from the linear map.

    Args:
        channels: C, of the field.
        factor: f, image pixels per latent pixel of the VAE along each axis.
        cell: image pixels per cell of the decoder's grid along each axis, a divisor of 2 f.
        width: channels between the convolutions.
        blocks: residual blocks.
    """

    def __init__(self, channels: int, factor: int, cell: int = 4, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        assert PHASES * factor % cell == 0, f"cell must divide {PHASES} * {factor}: {cell}"
        self.channels, self.factor, self.cell, self.width, self.blocks = channels, factor, cell, width, blocks
        self.head = nn.Conv2d(PHASES**2 * channels, width, 3, padding=1)
        self.body = nn.Sequential(*(_ResidualBlock(width) for _ in range(blocks)))
        self.tail = nn.Conv2d(width, 3 * cell**2, 3, padding=1)
        for parameter in self.tail.parameters():
            nn.init.zeros_(parameter)
        self.matrix = nn.Parameter(torch.zeros(3, channels))
        self.bias = nn.Parameter(torch.full((3,), 0.5))

    @torch.no_grad()
    def start_from(self, linear_rgb: LinearRGB, normalization: FieldNormalization) -> None:
        """Let the linear map be that of latents to RGB, which the decoder's pictures are until it is trained."""
        matrix, bias = linear_rgb.for_field(normalization)
        self.matrix.copy_(matrix)
        self.bias.copy_(bias)

    @property
    def density(self) -> int:
        """k, dense cells in the place of a latent pixel of the VAE, along each axis."""
        return PHASES * self.factor // self.cell

    def dense_dilation(self, dilation: float) -> float:
        """Return the dilation of this decoder's dense grid, see :func:`dense_dilation`."""
        return dense_dilation(dilation, self.density)

    @property
    def margin(self) -> int:
        """Cells on each side of a window that its pixels depend on."""
        return 2 + 2 * self.blocks

    def dense_size(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the dense grid for a picture of `height` x `width` pixels.

        The dense grid covers the latent grid, so the decoder's grid may reach farther than the picture needs.
        """
        rows, columns = latent_size(height, width, self.factor)
        return self.density * rows, self.density * columns

    def field_latents(self, dense: Tensor) -> Tensor:
        """Return the field latents on the VAE's grid [h, w, C] of a dense render [h k, w k, C]."""
        return mean_of_cells(dense, self.density)

    def forward(self, dense: Tensor) -> Tensor:
        """Return the picture of a whole grid, not limited to [0, 1], so that gradients survive outside; differentiable.

        Args:
            dense: [2 n, 2 m, C], field latents, or a batch of them, [B, 2 n, 2 m, C].

        Returns:
            [n cell, m cell, 3] RGB, or [B, n cell, m cell, 3]. A photograph's size is cut from it, and a window's
            pixels from the picture of the window with `margin` cells more around it.
        """
        if dense.ndim == 3:
            return self(dense[None])[0]
        planes = dense.permute(0, 3, 1, 2).flatten(0, 1)[:, None]  # [B C, 1, 2 n, 2 m]
        phases = F.pixel_unshuffle(planes, PHASES).unflatten(0, (len(dense), self.channels))  # [B, C, 4, n, m]
        upper_left, upper_right, lower_left, lower_right = phases.unbind(dim=2)
        upper, lower = upper_left + upper_right, lower_left + lower_right
        coarse = (upper + lower) / 4
        cells = torch.cat(
            [
                coarse - 0.5,  # the middle of a field's range
                (upper_right + lower_right - upper_left - lower_left) / 2,
                (lower - upper) / 2,
                (upper_left + lower_right - upper_right - lower_left) / 2,
            ],
            dim=1,
        )
        # Channels last: a tenth faster on a CPU, and what tensor cores want.
        x = self.head(cells.contiguous(memory_format=torch.channels_last))
        details = F.pixel_shuffle(self.tail(F.relu(self.body(x))), self.cell)
        linear = (coarse.permute(0, 2, 3, 1) @ self.matrix.T + self.bias).permute(0, 3, 1, 2)
        enlarged = F.interpolate(linear, scale_factor=self.cell, mode="bilinear", align_corners=False)
        # The first operand decides how the sum lies in memory: channels last, contiguous as [B, H, W, 3].
        return (details + enlarged).permute(0, 2, 3, 1)

    @torch.no_grad()
    def decode(self, dense: Tensor, height: int, width: int, tile: int = 256) -> Tensor:
        """Decode what a field renders, part by part where it is large; the result does not depend on the parts.

        Args:
            dense: [h k, w k, C] of size :meth:`dense_size`, field latents.
            height: of the picture in pixels.
            width: of the picture in pixels.
            tile: side of a part in cells, which bounds the memory.

        Returns:
            [height, width, 3] RGB in [0, 1].

        Raises:
            ValueError: the grid is not that of a picture of this size.
        """
        expected = (*self.dense_size(height, width), self.channels)
        if tuple(dense.shape) != expected:
            raise ValueError(
                f"a picture of {height} x {width} pixels needs a grid {expected}, not {tuple(dense.shape)}"
            )
        rows, columns = expected[0] // PHASES, expected[1] // PHASES
        picture = dense.new_empty(rows * self.cell, columns * self.cell, 3)
        for window in windows(rows, columns, tile):
            surrounded = window.grown(self.margin, rows, columns)
            part = self(dense[surrounded.slices(PHASES)])
            picture[window.slices(self.cell)] = part[window.slices(self.cell, surrounded)]
        return picture[:height, :width].clamp(0, 1)

    # ---------------------------------------------------------------- files

    @property
    def config(self) -> dict[str, int]:
        """The arguments that make a decoder of the same shape; with `state_dict()` all that a file must hold."""
        return {name: getattr(self, name) for name in _CONFIG}

    @classmethod
    def restored(
        cls, config: Any, tensors: Mapping[str, Tensor], channels: int, factor: int, where: str
    ) -> "SceneDecoder":
        """Make the decoder that `config` and `state_dict()` describe, on the device of the tensors.

        Args:
            config: as the property; of any type, as it comes from a file.
            tensors: as `state_dict()`.
            channels: of the field that it is to decode.
            factor: of the VAE in whose latent space the field is.
            where: the file, for messages.

        Raises:
            UserError: something is missing, damaged, or belongs to a decoder of another shape or for another VAE.
        """
        if not isinstance(config, Mapping) or not all(_is_count(config.get(name), name) for name in _CONFIG):
            raise UserError(
                f"The description of the scene's decoder in {where} is damaged: {config!r}. "
                "Take another copy of the file, or train the scene again."
            )
        if (config["channels"], config["factor"]) != (channels, factor):
            raise UserError(
                f"The scene's decoder in {where} is for latents of {config['channels']} channels and factor "
                f"{config['factor']}, not of {channels} and {factor}. Use the VAE that the scene was trained with."
            )
        if PHASES * factor % config["cell"]:
            raise UserError(
                f"The cell of the scene's decoder in {where}, {config['cell']} pixels, does not divide "
                f"{PHASES * factor}. Take another copy of the file, or train the scene again."
            )
        # Counts that no file can keep take long to make, or overflow.
        if max(config["width"], config["blocks"]) > sum(tensor.numel() for tensor in tensors.values()):
            raise UserError(
                f"The scene's decoder in {where} is described as larger than the file. Take another copy of the file, "
                "or train the scene again."
            )
        with torch.device("meta"):
            decoder = cls(**{name: config[name] for name in _CONFIG})
        expected = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            raise UserError(
                f"The scene's decoder in {where} is incomplete or of another shape ({', '.join(differing)}). "
                "Take another copy of the file, or train the scene again."
            )
        decoder.load_state_dict(dict(tensors), assign=True)
        return decoder.requires_grad_()


_CONFIG = ("channels", "factor", "cell", "width", "blocks")


def _is_count(value: Any, name: str) -> bool:
    """Whether a value from a file is a whole number that the argument `name` of a decoder may have."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= (0 if name == "blocks" else 1)
