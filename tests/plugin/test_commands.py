"""nerfstudio's commands on a trained scene."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from commands import Finished, TrainedScene, run
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from plyfile import PlyData
from tiny_scenes import floor_color

from lrf_nerfstudio.field.cameras import world_to_camera
from lrf_nerfstudio.field.latent_field import LatentField
from lrf_nerfstudio.plugin.cameras import grid_camera
from lrf_nerfstudio.plugin.pipeline import LatentPipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline(trained) -> LatentPipeline:
    """The trained scene as ns-eval loads it."""
    _, pipeline, _, _ = eval_setup(trained.config)
    return pipeline


def read_video(path: Path) -> np.ndarray:
    """Frames [N, H, W, 3] in [0, 1]."""
    video, frames = cv2.VideoCapture(str(path)), []
    while (frame := video.read()[1]) is not None:
        frames.append(frame[..., ::-1] / 255)
    return np.array(frames)


def read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture) / 255


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(a - b).mean()))


# ---------------------------------------------------------------------------------------------------- ns-train


def test_training_needs_no_option_and_no_download(trained, user_cache_folder):
    assert sorted(path.name for path in trained.run.iterdir() if not path.name.startswith("events")) == [
        "config.yml",
        "dataparser_transforms.json",
        "nerfstudio_models",
    ]
    assert len(list((user_cache_folder / "lrf_nerfstudio" / "latents").rglob("*.safetensors"))) >= 14
    assert not list(user_cache_folder.rglob("*.pth"))
    if not torch.cuda.is_available():
        assert trained.output.count("training on the CPU") == 1
    assert not [line for line in trained.output.splitlines() if "lrf_nerfstudio/" in line and "Warning" in line]


def test_help_explains_every_option():
    """All that ns-train offers for this method, nerfstudio's own options included."""
    help_text = run("ns-train", "latent-splatfacto", "--help", env={"COLUMNS": "80"}).check().output
    explanations: dict[str, str] = {}
    option = None
    for line in help_text.splitlines():
        body = line.strip("│").rstrip()
        if match := re.match(r" (?:-h, )?--([a-z][\w.-]*)", body):
            option = match.group(1)
            explanations[option] = ""
        elif option and line.startswith("│       "):
            explanations[option] += body
        elif not line.startswith("│ "):
            option = None
    for name, explanation in explanations.items():
        words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\((default|required).*", "", explanation))
        # An optimizer without a scheduler is an entry of a dictionary, which has no place for an explanation.
        assert len(words) >= 2 or re.fullmatch(r"optimizers\.[\w-]+\.scheduler", name), (name, explanation)
    own = ("pipeline.datamanager.latent-cache-dir", "pipeline.model.densification.max-gaussians", "pipeline.vae.source")
    assert set(own) <= set(explanations)
    for pointless in ("resolution-schedule", "cache-images", "collider", "grid-shape", "cull", "refine-every"):
        assert not [name for name in explanations if pointless in name]


# ---------------------------------------------------------------------------------------------------- ns-eval


def test_ns_eval(trained, tmp_path):
    pictures = tmp_path / "pictures"
    run(
        *("ns-eval", "--load-config", trained.config, "--output-path", tmp_path / "metrics.json"),
        *("--render-output-path", pictures),
    ).check()
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    names = {f"{kind}{name}" for kind in ("", "vae_", "ceiling_") for name in ("psnr", "ssim")}
    names |= {"latent_psnr", "raster_seconds", "decode_seconds"}
    if (Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth").exists():
        names |= {"lpips", "vae_lpips", "ceiling_lpips"}
    assert set(results) == names | {f"{name}_std" for name in names}
    assert all(np.isfinite(value) for value in results.values())
    assert results["ceiling_psnr"] > 20
    assert results["psnr"] > 18  # an untrained field has 13
    assert 0 < results["raster_seconds"] < 1
    assert 0 < results["decode_seconds"] < 2
    # The pictures show what was measured: photograph, reconstruction, the VAE's picture, the decoder's.
    paths = sorted(pictures.iterdir())
    assert len(paths) == 3
    parts = [np.split(read_picture(path), 4, axis=1) for path in paths]
    assert parts[0][0].shape == (149, 199, 3)
    for key, index in (("ceiling_psnr", 1), ("vae_psnr", 2), ("psnr", 3)):
        assert np.mean([psnr(part[0], part[index]) for part in parts]) == pytest.approx(results[key], abs=0.1)
    for part, path in zip(parts, ("000.png", "008.png", "016.png"), strict=True):
        assert np.abs(part[0] - read_picture(trained.scene / "images" / path)).max() < 0.003


def test_masks_leave_pixels_out_of_the_metrics(pipeline):
    camera, batch = pipeline.datamanager.eval_view(0)
    outputs = pipeline.model.render(camera)
    mask = torch.zeros(149, 199, dtype=torch.bool, device=pipeline.device)
    mask[:, 50:] = True
    spoiled = dict(outputs, rgb=torch.where(mask[..., None], outputs["rgb"], 0.0))
    expected, _ = pipeline.model.get_image_metrics_and_images(outputs, {**batch, "mask": mask})
    actual, _ = pipeline.model.get_image_metrics_and_images(spoiled, {**batch, "mask": mask})
    assert actual == expected
    inside = (outputs["rgb"] - batch["image"])[mask].square().mean()
    assert actual["psnr"] == pytest.approx(-10 * torch.log10(inside).item(), abs=1e-4)


# ---------------------------------------------------------------------------------------------------- ns-render


def camera_path(pipeline: LatentPipeline, height: int, width: int, frames: int = 4, **more: Any) -> dict[str, Any]:
    """What the viewer writes for a path along training cameras."""
    cameras = pipeline.datamanager.train_dataset.cameras
    fov = 2 * np.degrees(np.arctan(149 / 2 / 180))
    return {
        "camera_type": "perspective",
        "render_height": height,
        "render_width": width,
        "seconds": frames / 8,
        "fps": 8,
        "camera_path": [
            {
                "camera_to_world": [*cameras.camera_to_worlds[index].flatten().tolist(), 0, 0, 0, 1],
                "fov": fov,
                "aspect": width / height,
            }
            for index in range(frames)
        ],
        **more,
    }


def render_path(forked, trained: TrainedScene, folder: Path, path: dict[str, Any], *more: object) -> Finished:
    (folder / "path.json").write_text(json.dumps(path))
    return forked(
        *("ns-render", "camera-path", "--load-config", trained.config, "--camera-path-filename", folder / "path.json"),
        *("--output-path", folder / "out.mp4", *more),
    )


def test_a_camera_path_to_images(trained, pipeline, tmp_path, forked):
    more = [
        "--output-format",
        "images",
        "--image-format",
        "png",
        "--rendered-output-names",
        "rgb",
        "latent_rgb",
        "depth",
    ]
    render_path(forked, trained, tmp_path, camera_path(pipeline, 91, 123), *more).check()
    pictures = [read_picture(path) for path in sorted((tmp_path / "out").iterdir())]
    assert [picture.shape for picture in pictures] == [(91, 3 * 123, 3)] * 4
    for index, picture in enumerate(pictures):
        photograph, _ = pipeline.datamanager.train_dataset.photograph(index)
        small = torch.nn.functional.interpolate(photograph.permute(2, 0, 1)[None], size=(91, 123), mode="area")[
            0
        ].permute(1, 2, 0)
        assert psnr(picture[:, :123], small.numpy()) > 17
        assert psnr(picture[:, 123:246], small.numpy()) > 13


@pytest.mark.parametrize(("height", "width"), [(90, 122), (91, 123)], ids=["even", "odd"])
def test_a_camera_path_to_a_video(trained, pipeline, tmp_path, forked, height, width):
    render_path(forked, trained, tmp_path, camera_path(pipeline, height, width)).check()
    frames = read_video(tmp_path / "out.mp4")
    assert len(frames) == 4
    assert abs(frames.shape[1] - height) <= 1
    assert abs(frames.shape[2] - width) <= 1
    assert np.abs(frames[0] - frames[1]).mean() > 0.01  # it moves


def test_a_cropped_camera_path(trained, pipeline, tmp_path, forked):
    crop = {
        "crop_bg_color": {"r": 255, "g": 0, "b": 0},
        "crop_center": [50.0, 0.0, 0.0],
        "crop_scale": [0.1, 0.1, 0.1],
        "crop_rot": [0.0, 0.0, 0.0],
    }
    path = camera_path(pipeline, 40, 56, frames=1, crop=crop)
    render_path(forked, trained, tmp_path, path, "--output-format", "images", "--image-format", "png").check()
    picture = read_picture(tmp_path / "out" / "00000.png")
    assert (picture[..., 0] > picture[..., 1] + 0.3).all()  # nothing is inside: red, as far as the VAE can


def test_rendering_needs_no_photographs(trained, pipeline, tmp_path, forked):
    images, away = trained.scene / "images", tmp_path / "images"
    path = camera_path(pipeline, 64, 80, frames=1)
    shutil.move(images, away)
    try:
        render_path(forked, trained, tmp_path, path, "--output-format", "images").check()
    finally:
        shutil.move(away, images)
    assert (tmp_path / "out" / "00000.jpg").exists()


def test_other_camera_types_are_refused(trained, pipeline, tmp_path, forked):
    path = camera_path(pipeline, 64, 128, camera_type="equirectangular")
    assert "perspective" in render_path(forked, trained, tmp_path, path, "--output-format", "images").message


def rendered_view(pipeline: LatentPipeline, index: int) -> np.ndarray:
    """A held-out view as commands render it, [H, W, 3]."""
    camera = pipeline.datamanager.eval_dataset.cameras[index : index + 1]
    return pipeline.model.get_outputs_for_camera(camera)["rgb"].cpu().numpy()


def test_interpolate(trained, pipeline, tmp_path):
    run(
        *("ns-render", "interpolate", "--load-config", trained.config, "--output-path", tmp_path / "video.mp4"),
        *("--pose-source", "eval", "--interpolation-steps", 4, "--frame-rate", 8),
    ).check()
    frames = read_video(tmp_path / "video.mp4")
    assert len(frames) == 2 * 4  # between three held-out views
    rendered = (
        pipeline.model.get_outputs_for_camera(pipeline.datamanager.eval_dataset.cameras[0:1])["rgb"].cpu().numpy()
    )
    height, width = min(frames.shape[1], 149), min(frames.shape[2], 199)
    assert psnr(frames[0][:height, :width], rendered[:height, :width]) > 28  # but for the video's compression


def test_spiral(trained, tmp_path, forked):
    forked(
        *("ns-render", "spiral", "--load-config", trained.config, "--output-path", tmp_path / "spiral.mp4"),
        *("--seconds", 0.5, "--frame-rate", 8, "--output-format", "images", "--downscale-factor", 2),
    ).check()
    paths = sorted((tmp_path / "spiral").iterdir())
    assert len(paths) == 4
    assert read_picture(paths[0]).shape == (74, 99, 3)


def test_a_lost_photograph_is_named(trained, tmp_path, forked):
    photograph = trained.scene / "images" / "008.png"
    photograph.rename(tmp_path / "away.png")
    try:
        finished = forked(
            "ns-render", "dataset", "--load-config", trained.config, "--output-path", tmp_path / "renders"
        )
    finally:
        (tmp_path / "away.png").rename(photograph)
    assert str(photograph) in finished.message.replace("\n", "")


def test_dataset(trained, pipeline, tmp_path, forked):
    forked(
        *("ns-render", "dataset", "--load-config", trained.config, "--output-path", tmp_path, "--split", "train+test"),
        *("--image-format", "png"),
    ).check()
    folders = {"gt-rgb", "rgb", "latent_rgb", "depth", "accumulation", "vae_rgb"}
    for split, count in (("train", 14), ("test", 3)):
        assert {path.name for path in (tmp_path / split).iterdir()} == folders
        for folder in folders:
            assert len(list((tmp_path / split / folder).iterdir())) == count
    rendered, photograph = (read_picture(tmp_path / "test" / name / "008.png") for name in ("rgb", "gt-rgb"))
    assert rendered.shape == photograph.shape == (149, 199, 3)
    expected = (
        pipeline.model.get_outputs_for_camera(pipeline.datamanager.eval_dataset.cameras[1:2])["rgb"].cpu().numpy()
    )
    assert np.abs(rendered - expected).max() < 0.005
    assert np.abs(photograph - read_picture(trained.scene / "images" / "008.png")).max() < 0.005


# ---------------------------------------------------------------------------------------------------- export


def test_ns_export_gaussian_splat(trained, pipeline, tmp_path):
    if reason := open3d_problem():
        pytest.skip(reason)
    run("ns-export", "gaussian-splat", "--load-config", trained.config, "--output-dir", tmp_path).check()
    vertices = PlyData.read(tmp_path / "splat.ply")["vertex"]
    model = pipeline.model
    assert 100 < len(vertices) <= model.num_points
    names = {prop.name for prop in vertices.properties}
    assert {"x", "opacity", "scale_0", "rot_3", "f_dc_2", "f_rest_44"} <= names
    assert "f_rest_45" not in names  # 3 colours, 15 coefficients each
    # The colours of the Gaussians that show are those of the floor below them.
    parsed = pipeline.datamanager.train_dataparser_outputs
    transform, scale = parsed.dataparser_transform.numpy(), parsed.dataparser_scale
    xyz = np.stack([vertices[axis] for axis in "xyz"], axis=-1)
    world = (xyz / scale - transform[:3, 3]) @ transform[:3, :3]
    colors = 0.5 + 0.28209479177387814 * np.stack([vertices[f"f_dc_{index}"] for index in range(3)], axis=-1)
    shown = (1 / (1 + np.exp(-vertices["opacity"])) > 0.3) & (np.linalg.norm(world, axis=-1) < 1.0)
    assert shown.sum() > 20
    error = np.abs(np.clip(colors[shown], 0, 1) - floor_color(world[shown][:, :2]))
    assert np.median(error) < 0.12
    assert np.corrcoef(colors[shown].ravel(), floor_color(world[shown][:, :2]).ravel())[0, 1] > 0.7


def open3d_problem() -> str | None:
    """Why ns-export cannot start; in a process of its own, since open3d takes its time."""
    program = [sys.executable, "-W", "ignore", "-c", "import open3d"]
    finished = subprocess.run(program, capture_output=True, text=True)
    return None if finished.returncode == 0 else f"open3d does not import: {finished.stderr.strip().splitlines()[-1]}"


def test_the_exported_field_renders_what_the_model_does(trained, pipeline, tmp_path):
    from lrf_nerfstudio.commands import export_field

    export_field.main(export_field.ExportField(trained.config, tmp_path / "field.safetensors"))
    field = LatentField.load(tmp_path / "field.safetensors")
    field.check_vae(pipeline.model.vae)
    camera = pipeline.datamanager.eval_dataset.cameras[1:2]
    latent = field.render(
        world_to_camera(camera.camera_to_worlds)[0], camera.get_intrinsics_matrices()[0], width=199, height=149
    )
    rendered = pipeline.model.render(grid_camera(camera, 4, pipeline.device))["latent"].cpu()
    assert torch.allclose(latent.cpu(), rendered, atol=1e-4)
