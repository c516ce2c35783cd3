"""How well VAEs decode what radiance fields render, as numbers, a table and a figure."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrf_nerfstudio.evaluation.metrics import ImageMetrics
from lrf_nerfstudio.evaluation.tables import Column, as_markdown, grid_of_pictures, make_table, mean_of
from lrf_nerfstudio.training.data.latent_crops import KINDS
from lrf_nerfstudio.training.data.scene_pairs import ScenePairs
from lrf_nerfstudio.vae import VAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "novel PSNR": Column("novel", "psnr", 2),
    "SSIM": Column("novel", "ssim", 3),
    "LPIPS": Column("novel", "lpips", 3),
    "the VAE's PSNR": Column("novel", "vae_psnr", 2),
    "the VAE's SSIM": Column("novel", "vae_ssim", 3),
    "train PSNR": Column("train", "psnr", 2),
    "train SSIM": Column("train", "ssim", 3),
    "train LPIPS": Column("train", "lpips", 3),
    "latent PSNR": Column("novel", "latent_psnr", 2),
    "train latent PSNR": Column("train", "latent_psnr", 2),
    "recoded PSNR": Column("novel", "recoded_psnr", 2),
    "recoded SSIM": Column("novel", "recoded_ssim", 3),
    "recoded LPIPS": Column("novel", "recoded_lpips", 3),
    "ceiling PSNR": Column("novel", "ceiling_psnr", 2),
    "ceiling SSIM": Column("novel", "ceiling_ssim", 3),
    "ceiling LPIPS": Column("novel", "ceiling_lpips", 3),
    "fit, s": Column("cost", "seconds", 0),
    "memory, GB": Column("cost", "gigabytes", 2),
}
"""Columns of the table: kind of views or cost of the fit, metric, decimals."""


@torch.no_grad()
def measure_decoding(
    pairs: ScenePairs, vae: VAE, metrics: ImageMetrics, advance: Callable[[], object]
) -> dict[str, dict[str, float]]:
    """Metrics of a scene's last snapshot, by kind of view: means over the views.

    Args:
        pairs: of the scene.
        vae: decodes; its encoder is that of the pairs.
        metrics: compares pictures.
        advance: called after each view.

    Returns:
        For `train` and `novel`: `psnr, ssim, lpips` of the decoded render against the photograph, `latent_psnr` of the
        rendered against the encoded field latent (data range 1), and `ceiling_psnr, ceiling_ssim, ceiling_lpips` of the
        VAE's own reconstruction. LPIPS where it has weights.
    """
    normalization, steps = pairs.normalization, max(pairs.latents)
    means: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        of_views = []
        for view in pairs.of_kind(kind):
            image, latent, mask = _view(pairs, view, steps, vae.device)
            encoded = vae.encode(image[None])[0]
            error = F.mse_loss(normalization.to_field(latent.cpu()), normalization.to_field(encoded.cpu()))
            values = metrics(_decode(vae, latent, image), image, mask)
            values["latent_psnr"] = float(-10 * torch.log10(error))
            ceiling = metrics(_decode(vae, encoded, image), image, mask)
            of_views.append(values | {f"ceiling_{name}": value for name, value in ceiling.items()})
            advance()
        means[kind] = mean_of(of_views)
    return means


@torch.no_grad()
def measure_recoding(
    rgb: ScenePairs, rgb_vae: VAE, vae: VAE, metrics: ImageMetrics, advance: Callable[[], object]
) -> dict[str, float]:
    """What a VAE leaves of the renders of a field in RGB.

    It is what a latent field would give that is as true to the scene as the field in RGB. What a latent field stays
    below it is lost because latents disagree between views, or on the coarse grid; what it stays below the ceiling
    beyond that is lost in RGB too.

    Args:
        rgb: of the scene, rendered by its field in RGB.
        rgb_vae: in whose latent space, RGB, that field is.
        vae: encodes and decodes the renders.
        metrics: compares pictures.
        advance: called after each held-out view.

    Returns:
        Means over the held-out views: `recoded_psnr, recoded_ssim, recoded_lpips` of the RGB renders, encoded and
        decoded, against the photographs. LPIPS where it has weights.
    """
    of_views = []
    for view in rgb.of_kind("novel"):
        image, latent, mask = _view(rgb, view, max(rgb.latents), vae.device)
        encoded = vae.encode(_decode(rgb_vae, latent, image)[None])[0]
        of_views.append(metrics(_decode(vae, encoded, image), image, mask))
        advance()
    return {f"recoded_{name}": value for name, value in mean_of(of_views).items()}


def _view(pairs: ScenePairs, view: int, steps: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Photograph [H, W, 3] in [0, 1], rendered latent [C, h, w], and mask [H, W] if there is one."""
    image, mask = pairs.photograph(view)
    latent = pairs.latent(view, steps)
    return image.to(device).float() / 255, latent.to(device), None if mask is None else mask.to(device)


def _decode(vae: VAE, latent: Tensor, image: Tensor) -> Tensor:
    """A latent [C, h, w] as a picture of the size of another one, [H, W, 3]."""
    return vae.decode(latent[None], *image.shape[:2])[0]


def with_means(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Adds to rows {scene, vae, train, novel, cost} the means over the scenes of each VAE, where there are several.

    A VAE that was not measured on all scenes gets no mean, which could not be compared with those of the others.
    """
    scenes = {row["scene"] for row in rows}
    result = list(rows)
    for vae in dict.fromkeys(row["vae"] for row in rows) if len(scenes) > 1 else ():
        of_vae = [row for row in rows if row["vae"] == vae]
        if len(of_vae) == len(scenes):
            means = {part: mean_of([row[part] for row in of_vae]) for part in (*KINDS, "cost")}
            result.append({"scene": "mean", "vae": vae, **means})
    return result


def decoding_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows {scene, vae, train, novel, cost} as Markdown; columns that have no number anywhere are left out."""
    return as_markdown(make_table(rows, {"scene": "scene", "VAE": "vae"}, COLUMNS))


@torch.no_grad()
def decoding_figure(scenes: Mapping[str, Mapping[str, ScenePairs]], vaes: Mapping[str, VAE]) -> "Figure":
    """Draws a held-out view of each scene: photograph, the first VAE's reconstruction, and each VAE's decoded render.

    Args:
        scenes: scene -> VAE -> the pairs in the latent space of that VAE.
        vaes: by name.
    """
    titles = ["photograph", f"ceiling of {next(iter(vaes))}", *vaes]
    rows: list[dict[str, Tensor]] = []
    for by_vae in scenes.values():
        row: dict[str, Tensor] = {}
        for name, pairs in by_vae.items():
            held_out = pairs.of_kind("novel")
            view = held_out[len(held_out) // 2]
            image, latent, _ = _view(pairs, view, max(pairs.latents), vaes[name].device)
            row["photograph"] = image
            if name == next(iter(vaes)):
                row[titles[1]] = _decode(vaes[name], vaes[name].encode(image[None])[0], image)
            row[name] = _decode(vaes[name], latent, image)
        rows.append(row)
    pictures = {
        scene: {title: picture.cpu().numpy() for title, picture in row.items()}
        for scene, row in zip(scenes, rows, strict=True)
    }
    return grid_of_pictures(pictures, titles)
