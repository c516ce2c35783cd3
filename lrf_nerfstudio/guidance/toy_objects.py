"""Ten objects by color and shape, with captions, for a small diffusion model to learn."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrf_nerfstudio.guidance.orbits import OrbitConfig, OrbitViews, random_orbits
from lrf_nerfstudio.guidance.prompts import PromptConfig, view_of
from lrf_nerfstudio.synthetic.cameras import Cameras
from lrf_nerfstudio.synthetic.geometry import Shape, Vec3
from lrf_nerfstudio.synthetic.patterns import Pattern
from lrf_nerfstudio.synthetic.raytracer import Scene, cast_rays, render
from lrf_nerfstudio.synthetic.scenes import Light, Material, Object, assemble, sun

DARK, WHITE = (0.02, 0.02, 0.02), (0.9, 0.9, 0.9)
SAMPLES = 2
"""Rays in a pixel along each axis."""


class ToyObject(NamedTuple):
    """An object at the origin, within half a unit of it."""

    name: str
    """Its caption without the view."""
    color: Vec3
    """Linear RGB."""
    shape: Shape
    size: Vec3
    """See `Shape`."""
    front: float
    """How far the surface is from the origin along x, where the object's eye is."""
    eye: Vec3 = DARK
    """Color of the small ball that tells the front from the back."""


OBJECTS = (
    ToyObject("a red cube", (0.7, 0.03, 0.03), Shape.BOX, (0.27, 0.27, 0.27), 0.27),
    ToyObject("a green cube", (0.04, 0.45, 0.06), Shape.BOX, (0.27, 0.27, 0.27), 0.27),
    ToyObject("a blue ball", (0.03, 0.08, 0.65), Shape.SPHERE, (0.36, 0.0, 0.0), 0.36),
    ToyObject("a yellow ball", (0.85, 0.65, 0.03), Shape.SPHERE, (0.36, 0.0, 0.0), 0.36),
    ToyObject("an orange cylinder", (0.85, 0.25, 0.02), Shape.CYLINDER, (0.2, 0.36, 0.0), 0.2),
    ToyObject("a purple cylinder", (0.25, 0.03, 0.4), Shape.CYLINDER, (0.2, 0.36, 0.0), 0.2),
    ToyObject("a cyan ring", (0.03, 0.55, 0.6), Shape.RING, (0.3, 0.13, 0.0), 0.43),
    ToyObject("a pink ring", (0.85, 0.25, 0.45), Shape.RING, (0.3, 0.13, 0.0), 0.43),
    ToyObject("a white vase", WHITE, Shape.VASE, (0.28, 0.38, 0.5), 0.17),
    ToyObject("a black vase", DARK, Shape.VASE, (0.28, 0.38, 0.5), 0.17, eye=WHITE),
)
_LIGHT = Light([sun((0.3, -0.4, 0.8), (0.7, 0.7, 0.7), softness=8.0)], horizon=(0.5, 0.5, 0.5), zenith=(0.7, 0.7, 0.7))


class View(NamedTuple):
    """A picture of an object."""

    image: Tensor
    """[H, W, 3], RGB in [0, 1], the object over a plain background of a random pale color."""
    name: str
    """Caption without the view."""
    caption: str
    """Caption with it, in the words of :class:`~lrf_nerfstudio.guidance.ViewPrompts`."""


def render_views(config: OrbitConfig, views: int, cell: float) -> Iterator[View]:
    """Ray-trace objects in turn, each `views` times, from random cameras.

    Args:
        config: where the cameras are, and the size of the pictures in cells.
        views: pictures of each object.
        cell: pixels per cell.
    """
    rng = np.random.default_rng([config.seed, 1])
    steps = -(-views * len(OBJECTS) // config.views)
    orbits = (random_orbits(config, step, cell) for step in range(steps))
    cameras = ((orbit, index) for orbit in orbits for index in range(config.views))
    for (orbit, index), thing in zip(cameras, itertools.cycle(OBJECTS)):
        red, green, blue = (0.7 * rng.uniform() + 0.3 * rng.uniform(size=3)).tolist()
        image = _picture(_scene(thing, (red, green, blue)), _camera(orbit, index))
        view = view_of(orbit.azimuths[index], orbit.elevations[index], PromptConfig())
        yield View(image, thing.name, f"{thing.name}, {view} view")


def render_object(thing: ToyObject, orbit: OrbitViews) -> tuple[Tensor, Tensor]:
    """Ray-trace an object from B cameras, before white, of which the tone curve makes a light gray.

    Returns:
        Pictures [B, H, W, 3], RGB in [0, 1], and silhouettes [B, H, W], True where a pixel's center is the object's.
    """
    scene = _scene(thing, (1.0, 1.0, 1.0))
    cameras = [_camera(orbit, index) for index in range(len(orbit.poses))]
    pictures = torch.stack([_picture(scene, camera) for camera in cameras])
    return pictures, torch.stack([_silhouette(scene, camera) for camera in cameras])


def _camera(orbit: OrbitViews, index: int) -> Cameras:
    pose = np.eye(4)
    pose[:3] = orbit.poses[index].numpy()
    grid = orbit.camera
    return Cameras(pose[None], orbit.focals[index] * grid.cell, grid.height, grid.width)


def _scene(thing: ToyObject, background: Vec3) -> Scene:
    return assemble(_parts(thing), Material(Pattern.PLAIN, [background] * 4), _LIGHT, seed=0)


def _picture(scene: Scene, camera: Cameras) -> Tensor:
    return torch.from_numpy(render(scene, camera, 0, SAMPLES)).float() / 255.0


def _silhouette(scene: Scene, camera: Cameras) -> Tensor:
    lines, columns = np.indices((camera.height, camera.width))
    pixels = np.stack([columns.ravel(), lines.ravel()], axis=-1) + 0.5
    _, objects = cast_rays(scene, *camera.rays(0, pixels))
    inside = objects != len(scene.geometry.shapes) - 1  # the last is the background
    return torch.from_numpy(inside).view(camera.height, camera.width)


def _parts(thing: ToyObject) -> list[Object]:
    """Return the object and its eye."""
    body = Material(Pattern.PLAIN, [thing.color] * 4)
    eye = Material(Pattern.PLAIN, [thing.eye] * 4)
    return [
        Object(thing.shape, thing.size, (0.0, 0.0, 0.0), body),
        Object(Shape.SPHERE, (0.08, 0.0, 0.0), (thing.front, 0.0, 0.05), eye),
    ]
