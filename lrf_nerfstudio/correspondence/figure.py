"""A picture of the matches of two photographs."""

from pathlib import Path

import numpy as np

from lrf_nerfstudio.correspondence.matching import SceneCorrespondences
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import replacing

HEIGHT = 900
"""Pixels that both photographs are as high as in the figure."""


def draw_matches(correspondences: SceneCorrespondences, pair: int, output: Path, lines: int = 60) -> None:
    """Draw a pair's photographs side by side, with a dot for each match on both and lines between some of them.

    A match has one colour on both sides, by where it is in the first photograph from left to right, so that matches
    without a line can be followed too.

    Args:
        correspondences: matches of a scene.
        pair: index into `correspondences.pairs`.
        output: the PNG file to write.
        lines: how many matches get a line, spread over the photograph.

    Raises:
        UserError: a photograph cannot be read or the figure cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from PIL import Image

    matches = correspondences.pairs[pair]
    pictures, points, left = [], [], 0.0
    for index, pixels in ((matches.i, matches.points_i), (matches.j, matches.points_j)):
        view = correspondences.scene.views[index]
        width = round(view.width * HEIGHT / view.height)
        try:
            with Image.open(view.path) as image:
                pictures.append(np.asarray(image.convert("RGB").resize((width, HEIGHT), Image.Resampling.LANCZOS)))
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for files that are cut off or damaged
            raise UserError(f"The image {view.path} cannot be read: {error}.") from error
        points.append(pixels * (width / view.width, HEIGHT / view.height) + (left, 0.0))
        left += width
    canvas = np.concatenate(pictures, axis=1)
    figure = Figure(figsize=(canvas.shape[1] / 100, HEIGHT / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(canvas, extent=(0, canvas.shape[1], HEIGHT, 0), interpolation="none")
    colours = colormaps["turbo"](points[0][:, 0].argsort().argsort() / len(points[0]))
    drawn = spread_out(points[0], lines)
    segments = np.stack(points, axis=1)[drawn]  # [lines, 2, 2]
    axes.add_collection(LineCollection(list(segments), colors=colours[drawn], linewidths=0.8, alpha=0.7))
    for side in points:
        axes.scatter(side[:, 0], side[:, 1], s=16, c=colours, edgecolors="black", linewidths=0.3)
    axes.set_xlim(0, canvas.shape[1])
    axes.set_ylim(HEIGHT, 0)
    with replacing(Path(output)) as stream:
        FigureCanvasAgg(figure).print_png(stream)


def spread_out(points: np.ndarray, count: int) -> np.ndarray:
    """Indices of up to `count` of the points [N, 2], each the furthest from those before it."""
    if len(points) <= count:
        return np.arange(len(points))
    chosen = [0]
    distances = np.full(len(points), np.inf)
    while len(chosen) < count:
        distances = np.minimum(distances, np.linalg.norm(points - points[chosen[-1]], axis=1))
        chosen.append(int(distances.argmax()))
    return np.array(chosen)
