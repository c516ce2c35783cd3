"""Time the rasterizer, forward and backward, over numbers of Gaussians, grids and channels.

The scene is a cloud of Gaussians at random places of the grid with projected standard deviations of 0.5 to 2 pixels and
opacities up to 0.5. On the CPU three things are timed:

- the kernels (`forward_ms`, `forward_backward_ms`): sorting, binning, blending and back, from projected Gaussians;
- all of `rasterize()` (`rasterize_forward_backward_ms`): projection and harmonics of degree 3 too;
- a dense PyTorch reference of the same blending (the better of two runs), in cases of at most `reference_limit` pairs
  of Gaussian and pixel, 45 million: up to 10,000 Gaussians on 64 x 64 pixels. Null in larger ones.

`limit_ms` is what forward and backward could not fall below on this machine: the floating-point operations of all
pairs of Gaussian and pixel that contribute (alpha of 1/255 and more), divided by the measured rate of fused
multiply-adds of all threads. On CUDA `forward_ms` and `forward_backward_ms` are those of `rasterize()`.

Example: `lrf benchmark-rasterizer --output bench.json --plot scaling.png`.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lrf_nerfstudio.splatting import Gaussians, RasterSettings, rasterize
from lrf_nerfstudio.splatting.reference import blend_reference
from lrf_nerfstudio.utils.files import replacing, write_atomically
from lrf_nerfstudio.utils.options import AtLeastOne, Count

FORWARD_FLOPS, FORWARD_FLOPS_PER_CHANNEL = 31, 2
"""Of one Gaussian in one pixel; 2 for a multiply-add. Alpha takes 28 of them, half of that the exponential."""
BACKWARD_FLOPS, BACKWARD_FLOPS_PER_CHANNEL = 47, 4
"""Likewise: alpha once more, the chain rule, and sums over pixels of six moments and of every channel."""

BASE_GRID = (64, 64)


@dataclass
class RasterizerBenchmark:
    """Time the rasterizer and compare it with a dense reference and with the arithmetic limit of the machine."""

    gaussians: tuple[AtLeastOne, ...] = (1_000, 3_000, 10_000, 30_000)
    """Numbers of Gaussians."""
    grids: tuple[tuple[AtLeastOne, AtLeastOne], ...] = ((34, 60), (64, 64), (128, 128))
    """Heights and widths of the latent grid."""
    channels: tuple[AtLeastOne, ...] = (4, 16)
    """Numbers of latent channels."""
    repeats: AtLeastOne = 30
    """Timed runs of each case, after three that do not count; medians are reported."""
    reference_limit: Count = 45_000_000
    """Largest number of pairs of Gaussian and pixel for the dense reference, which keeps about 60 bytes of each."""
    seed: Count = 0
    """Seed of the random scenes."""
    output: Path | None = None
    """JSON file for the rows of the table."""
    plot: Path | None = None
    """PNG file for a plot of time against the number of Gaussians and against pixels (timed beside the table)."""

    def run(self) -> None:
        """Measure, print a table, write the files."""
        backends: list[Literal["cpu", "cuda"]] = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        peak = measured_peak()
        cases = [(n, grid, c) for n in self.gaussians for grid in self.grids for c in self.channels]
        rows = []
        for n, grid, channels in track(cases, description="Benchmark"):
            case = Case.random(n, *grid, channels, seed=self.seed)
            rows += [self.row(case, backend, peak) for backend in backends]
        print_table(rows, peak)
        if self.output:
            write_atomically(self.output, (json.dumps(rows, indent=2) + "\n").encode())
        if self.plot:
            figure = self.scaling_figure()
            with replacing(self.plot) as stream:
                figure.savefig(stream, dpi=150, format="png")

    def row(self, case: "Case", backend: Literal["cpu", "cuda"], peak: float) -> dict[str, Any]:
        """The measurements of one case; times in milliseconds."""
        whole = self.timed(case.rasterize_step(backend), backend)
        forward, both = self.timed(case.kernel_step(), "cpu") if backend == "cpu" else whole
        reference = None
        if backend == "cpu" and case.n * case.height * case.width <= self.reference_limit:
            reference = sum(min((case.reference_step()() for _ in range(2)), key=sum))
        flops = case.contributions * (
            FORWARD_FLOPS + BACKWARD_FLOPS + (FORWARD_FLOPS_PER_CHANNEL + BACKWARD_FLOPS_PER_CHANNEL) * case.channels
        )
        return {
            "backend": backend,
            "gaussians": case.n,
            "height": case.height,
            "width": case.width,
            "channels": case.channels,
            "forward_ms": forward,
            "forward_backward_ms": both,
            "reference_forward_backward_ms": reference,
            "rasterize_forward_ms": whole[0],
            "rasterize_forward_backward_ms": whole[1],
            "contributions": case.contributions,
            "limit_ms": 1e3 * flops / peak if backend == "cpu" else None,
        }

    def timed(self, step: Callable[[], tuple[float, float]], backend: str) -> tuple[float, float]:
        """Median milliseconds of forward and of forward + backward."""
        for _ in range(3):
            step()
        samples = [step() for _ in range(self.repeats)]
        return median(forward for forward, _ in samples), median(forward + backward for forward, backward in samples)

    def scaling_figure(self) -> Any:
        """Time of `rasterize()`, forward and backward, against Gaussians and against pixels."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        backend: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
        counts = [2_500, 5_000, 10_000, 20_000, 40_000, 80_000]
        edges = [32, 48, 64, 96, 128, 192]
        for channels in self.channels:
            cases = [Case.random(n, *BASE_GRID, channels, self.seed) for n in counts]
            draw(left, counts, [self.timed(case.rasterize_step(backend), backend)[1] for case in cases], channels)
            # The same scene at a finer grid: Gaussians grow with the pixels' number.
            cases = [Case.random(10_000, edge, edge, channels, self.seed, edge / BASE_GRID[0]) for edge in edges]
            pixels = [edge * edge for edge in edges]
            draw(right, pixels, [self.timed(case.rasterize_step(backend), backend)[1] for case in cases], channels)
        left.set_xlabel(f"Gaussians (grid {BASE_GRID[0]} x {BASE_GRID[1]})")
        right.set_xlabel("pixels of the grid (10,000 Gaussians)")
        for axes in (left, right):
            axes.set_ylabel("forward + backward, ms")
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=5)
            axes.grid(alpha=0.3)
            axes.legend()
            rate = axes.secondary_yaxis("right", functions=(per_second, per_second))
            rate.set_ylabel("steps per second")
            rate.set_yticks([10, 15, 20, 30, 50, 100, 200])
        return figure


def per_second(milliseconds: Any) -> Any:
    """1000 / x, away from zero; its own inverse."""
    import numpy as np

    return 1e3 / np.maximum(milliseconds, 1e-3)


def draw(axes: Any, sizes: list[int], times: list[float], channels: int) -> None:
    """One line of the plot, and the straight line through its last point."""
    (line,) = axes.plot(sizes, times, "o-", label=f"{channels} channels")
    axes.plot([0, sizes[-1]], [0, times[-1]], ":", color=line.get_color(), linewidth=1)


@dataclass
class Case:
    """Projected Gaussians on a grid, and 3D Gaussians that project to them."""

    height: int
    width: int
    means2d: Tensor  # [N, 2]
    axes: Tensor  # [N, 2], standard deviations in pixels
    angles: Tensor  # [N]
    opacities: Tensor  # [N]
    depths: Tensor  # [N]
    coefficients: Tensor  # [N, 16, C]
    v_features: Tensor  # [1, H, W, C], gradient of the image

    @classmethod
    def random(cls, n: int, height: int, width: int, channels: int, seed: int, magnification: float = 1.0) -> "Case":
        """The scene of this benchmark; `magnification` multiplies the standard deviations."""
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        return cls(
            height=height,
            width=width,
            means2d=uniform(n, 2) * torch.tensor([width, height]),
            axes=(0.5 + 1.5 * uniform(n, 2)) * magnification,
            angles=math.pi * uniform(n),
            opacities=0.5 * uniform(n),
            depths=1.0 + uniform(n),
            coefficients=torch.randn(n, 16, channels, generator=generator),
            v_features=torch.randn(1, height, width, channels, generator=generator),
        )

    @property
    def n(self) -> int:
        """Number of Gaussians."""
        return len(self.means2d)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.coefficients.shape[-1]

    @property
    def conics(self) -> Tensor:
        """Inverse covariances [N, 3]."""
        cos, sin = self.angles.cos(), self.angles.sin()
        first, second = self.axes.square().reciprocal().unbind(-1)
        a, c = first * cos * cos + second * sin * sin, first * sin * sin + second * cos * cos
        return torch.stack([a, (first - second) * cos * sin, c], dim=-1)

    @property
    def contributions(self) -> int:
        """Pairs of Gaussian and pixel with an alpha of at least 1/255."""
        x, y = torch.arange(self.width) + 0.5, torch.arange(self.height) + 0.5
        total = 0
        for mean, conic, opacity in zip(
            self.means2d.split(512), self.conics.split(512), self.opacities.split(512), strict=True
        ):
            dx, dy = x - mean[:, 0, None, None], y[:, None] - mean[:, 1, None, None]
            a, b, c = conic.T[:, :, None, None]
            sigmas = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
            total += int((opacity[:, None, None] * torch.exp(-sigmas) >= 1 / 255).sum())
        return total

    def kernel_step(self) -> Callable[[], tuple[float, float]]:
        """Sorting, binning, blending, and the way back: a function that returns the times of one run."""
        from lrf_nerfstudio.splatting.cpu.autograd import Blend

        settings = RasterSettings(self.width, self.height, render_depth=False)
        leaves = [self.means2d, self.conics, self.opacities, self.coefficients[:, 0]]
        leaves = [leaf[None].clone().requires_grad_() for leaf in leaves]
        depths, radii = self.depths[None], torch.ones(1, self.n, dtype=torch.int32)
        return stepper(lambda: Blend.apply(*leaves, depths, radii, settings)[0], leaves, self.v_features, lambda: None)

    def reference_step(self) -> Callable[[], tuple[float, float]]:
        """The same in dense PyTorch."""
        leaves = [self.means2d, self.conics, self.opacities, self.coefficients[:, 0]]
        means2d, conics, opacities, channels = leaves = [leaf.clone().requires_grad_() for leaf in leaves]

        def forward() -> Tensor:
            return blend_reference(means2d, conics, opacities, channels, self.depths, self.width, self.height)[0]

        return stepper(forward, leaves, self.v_features[0], lambda: None)

    def rasterize_step(self, backend: Literal["cpu", "cuda"]) -> Callable[[], tuple[float, float]]:
        """`rasterize()` of flat 3D Gaussians under a long lens, which project to those of the other steps."""
        focal = 100.0 * max(self.width, self.height)
        center = torch.tensor([self.width / 2, self.height / 2])
        scale = (self.depths / focal)[:, None]
        means = torch.cat([(self.means2d - center) * scale, self.depths[:, None]], dim=-1)
        scales = torch.cat([self.axes * scale, 1e-3 * scale], dim=-1)
        quats = torch.zeros(self.n, 4)
        quats[:, 0], quats[:, 3] = (self.angles / 2).cos(), (self.angles / 2).sin()
        K = torch.tensor([[focal, 0.0, self.width / 2], [0.0, focal, self.height / 2], [0.0, 0.0, 1.0]])
        leaves = [means, quats, scales, self.opacities, self.coefficients[:, 0], self.coefficients[:, 1:]]
        leaves = [leaf.to(backend, copy=True).requires_grad_() for leaf in leaves]
        viewmats, Ks = torch.eye(4)[None].to(backend), K[None].to(backend)
        settings = RasterSettings(self.width, self.height, sh_degree=3, eps2d=0.0, render_depth=False)
        wait = torch.cuda.synchronize if backend == "cuda" else lambda: None
        return stepper(
            lambda: rasterize(Gaussians(*leaves), viewmats, Ks, settings).features,
            leaves,
            self.v_features.to(backend),
            wait,
        )


def stepper(
    forward: Callable[[], Tensor], leaves: list[Tensor], v_image: Tensor, wait: Callable[[], None]
) -> Callable[[], tuple[float, float]]:
    """A function that runs forward and backward once and returns the milliseconds of each."""

    def step() -> tuple[float, float]:
        wait()
        start = time.perf_counter()
        image = forward()
        wait()
        middle = time.perf_counter()
        torch.autograd.grad(image, leaves, v_image)
        wait()
        return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)

    return step


def measured_peak() -> float:
    """Floating-point operations a second of independent fused multiply-adds on all threads, float32."""
    import numpy as np

    from lrf_nerfstudio.splatting.cpu import threads
    from lrf_nerfstudio.splatting.cpu.simd import LANES, fma, load, store

    @threads.kernel
    def multiply_add(begin, end, rounds, numbers):  # type: ignore[no-untyped-def] # numba infers the types
        for item in range(begin, end):
            x, y = load(numbers, 0), load(numbers, LANES)
            a = b = c = d = e = f = g = h = x
            for _ in range(rounds):
                a, b, c, d = fma(a, x, y), fma(b, x, y), fma(c, x, y), fma(d, x, y)
                e, f, g, h = fma(e, x, y), fma(f, x, y), fma(g, x, y), fma(h, x, y)
            store(numbers, (2 + item) * LANES, a + b + c + d + e + f + g + h)

    items, rounds = 8 * threads.thread_count(), 100_000
    numbers = np.full((2 + items, LANES), 0.5, np.float32)
    ranges = threads.even_ranges(items, 1)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        threads.run(multiply_add, ranges, rounds, numbers)
        seconds.append(time.perf_counter() - start)
    return 8 * 2 * LANES * rounds * items / min(seconds)


def print_table(rows: list[dict[str, Any]], peak: float) -> None:
    """The rows, for people."""
    table = Table(title=f"Rasterizer, milliseconds; {peak / 1e9:.0f} GFLOP/s of multiply-adds measured on the CPU")
    columns = {
        "backend": "backend",
        "Gaussians": "gaussians",
        "C": "channels",
        "fwd": "forward_ms",
        "fwd+bwd": "forward_backward_ms",
        "limit": "limit_ms",
        "dense": "reference_forward_backward_ms",
        "rasterize()": "rasterize_forward_backward_ms",
    }
    for title in ("backend", "Gaussians", "grid", *list(columns)[2:]):
        table.add_column(title, justify="left" if title == "backend" else "right")
    for row in rows:
        values = [row[key] for key in columns.values()]
        cells = [
            "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value) for value in values
        ]
        table.add_row(*cells[:2], f"{row['height']} x {row['width']}", *cells[2:])
    Console().print(table)


def main(options: RasterizerBenchmark) -> None:
    """Measure, print a table, write the files."""
    options.run()
