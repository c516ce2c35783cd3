"""Photographs and their cameras: undistorted, of any size and file format, and checked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image
from tiny_scenes import Lens, edit_transforms, photograph, poses_around, write_scene

from lrf_nerfstudio.plugin.dataparser import parse, setup_dataparser
from lrf_nerfstudio.plugin.dataset import PinholeDataset
from lrf_nerfstudio.utils.errors import UserError

OPENCV = Lens(121, 90, 100.0, (58.3, 47.1), "OPENCV", {"k1": -0.16, "k2": 0.05, "p1": 0.004, "p2": -0.006})
FISHEYE = Lens(121, 90, 80.0, (58.3, 47.1), "OPENCV_FISHEYE", {"k1": 0.08, "k2": -0.02, "k3": 0.004, "k4": -0.001})


def dataset_of(scene: Path, scale: float = 1.0) -> PinholeDataset:
    """All views of a scene."""
    config = NerfstudioDataParserConfig(data=scene, eval_mode="all")
    return PinholeDataset(parse(setup_dataparser(config), scene, "train"), scale)


# ---------------------------------------------------------------------------------------------------- lens distortion


@pytest.mark.parametrize("lens", [OPENCV, FISHEYE], ids=["opencv", "fisheye"])
def test_undistorted_photographs_are_what_the_pinhole_camera_sees(tmp_path, lens):
    dataset = dataset_of(write_scene(tmp_path / "scene", views=3, lenses=lens))
    for index, pose in enumerate(poses_around(3)):
        image, mask = dataset.photograph(index)
        assert mask is None
        assert image.shape == (*dataset.size(index), 3)
        camera = dataset.cameras[index]
        assert camera.distortion_params is None
        # Ray-trace the floor with the camera that the data set promises.
        height, width = dataset.size(index)
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        rays = np.stack([(x - camera.cx.item()) / camera.fx.item(), (y - camera.cy.item()) / camera.fy.item()], axis=-1)
        expected = photograph(pose, PlainRays(rays))
        error = np.abs(image.numpy() - expected)[1:-1, 1:-1]  # OpenCV blends the outermost pixels with black
        assert error.mean() < 0.002  # half a pixel off would be 0.012
        assert error.max() < 0.02


class PlainRays(Lens):
    """A lens given by its rays through z = 1, [H, W, 2]."""

    def __init__(self, plane: np.ndarray):
        super().__init__()
        self.plane = plane

    def rays(self) -> np.ndarray:
        return np.concatenate([self.plane, np.ones_like(self.plane[..., :1])], axis=-1)


@pytest.mark.parametrize("lens", [OPENCV, FISHEYE], ids=["opencv", "fisheye"])
def test_undistortion_is_nerfstudios(tmp_path, lens):
    scene = write_scene(tmp_path / "scene", views=2, lenses=lens, masked=True)
    dataset = dataset_of(scene)
    # "gpu" means `device`; "cpu" means pinned memory, which needs CUDA.
    config = FullImageDatamanagerConfig(
        dataparser=NerfstudioDataParserConfig(data=scene, eval_mode="all"), cache_images="gpu"
    )
    nerfstudio = config.setup(device="cpu")
    for index in range(2):
        image, mask = dataset.photograph(index)
        theirs = nerfstudio.cached_train[index]
        assert torch.equal(image, theirs["image"])
        assert not (mask & ~theirs["mask"][..., 0]).any()
        assert (mask == theirs["mask"][..., 0]).float().mean() > 0.98  # on the mask's edge we are stricter
        ours, reference = dataset.cameras[index], nerfstudio.train_dataset.cameras[index]
        assert torch.equal(ours.get_intrinsics_matrices(), reference.get_intrinsics_matrices())
        assert (ours.width, ours.height) == (reference.width, reference.height)


def test_cameras_are_undistorted_without_opening_images(tmp_path):
    scene = write_scene(tmp_path / "scene", views=2, lenses=OPENCV)
    edit_transforms(scene)
    config = NerfstudioDataParserConfig(data=scene, eval_mode="all", downscale_factor=1)
    shutil.rmtree(scene / "images")
    dataset = PinholeDataset(parse(setup_dataparser(config), scene, "train"))
    assert dataset.size(0) != (OPENCV.height, OPENCV.width)  # the lens's black corners are cut off


def test_an_unsupported_lens_is_named(tmp_path):
    scene = write_scene(tmp_path / "scene", views=2)
    edit_transforms(scene, camera_model="EQUIRECTANGULAR")
    with pytest.raises(UserError, match="cannot be undistorted"):
        dataset_of(scene)


# ---------------------------------------------------------------------------------------------------- sizes, formats


def test_sizes_may_differ_within_a_scene(tmp_path):
    lenses = [Lens(96, 72), Lens(64, 101, 70.0), OPENCV]
    dataset = dataset_of(write_scene(tmp_path / "scene", views=6, lenses=lenses))
    dataset.check_sizes()
    for index in range(6):
        assert dataset.photograph(index)[0].shape == (*dataset.size(index), 3)
    assert dataset.size(0) == (72, 96)
    assert dataset.size(1) == (101, 64)


@pytest.mark.parametrize("scale", [0.5, 0.29, 0.7, 2.0])
def test_camera_res_scale_factor(tmp_path, scale):
    scene = write_scene(tmp_path / "scene", views=2, lenses=Lens(100, 70), masked=True)
    dataset = dataset_of(scene, scale)
    dataset.check_sizes()
    image, mask = dataset.photograph(0)
    assert image.shape == (*dataset.size(0), 3)
    assert mask.shape == dataset.size(0)
    assert dataset.cameras.fx[0] == pytest.approx(90.0 * scale)
    # The same colours in the same places.
    full, _ = dataset_of(scene).photograph(0)
    rows, columns = (np.arange(n) for n in dataset.size(0))
    nearest = full[((rows + 0.5) / scale).astype(int)][:, ((columns + 0.5) / scale).astype(int)]
    assert (image - nearest).abs().mean() < 0.02


def save_as(mode: str, path: Path, picture: Image.Image) -> None:
    if mode.startswith("P"):
        picture = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=200)
        picture.save(path, **({"transparency": picture.getpixel((0, 0))} if "transparency" in mode else {}))
    elif mode == "CMYK":
        picture.convert("CMYK").save(path, format="JPEG", quality=100, subsampling=0)
    elif mode == "16 bit grey":
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        picture.convert(mode).save(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "P with transparency", "L", "LA", "1", "CMYK", "16 bit grey"])
def test_image_modes(tmp_path, mode):
    scene = write_scene(tmp_path / "scene", views=2)
    path = scene / "images" / "000.png"
    with Image.open(path) as picture:
        rgb, grey = np.asarray(picture) / 255, np.asarray(picture.convert("L")) / 255
        save_as(mode, path, picture)
    image, _ = dataset_of(scene).photograph(0)
    assert image.shape == (72, 96, 3)
    assert image.dtype == torch.float32
    if mode in ("L", "LA", "16 bit grey"):
        assert np.abs(image.numpy() - grey[..., None]).max() < 0.005
    elif mode == "1":
        assert set(image.unique().tolist()) == {0.0, 1.0}
    elif mode == "P with transparency":
        assert image[0, 0].tolist() == [1, 1, 1]  # transparent is white
    else:
        assert np.abs(image.numpy() - rgb).mean() < 0.03


def test_transparency_is_composited_over_white_everywhere(tmp_path):
    scene = write_scene(tmp_path / "scene", views=2, transparent=True)
    dataset = dataset_of(scene)
    assert dataset.background_rgb.tolist() == [1, 1, 1]
    image, _ = dataset.photograph(0)
    assert image.shape[-1] == 3
    assert image[0, 0].tolist() == [1, 1, 1]
    assert (image[36, 48] < 1).any()
    # What nerfstudio's commands take from the data set is the same picture.
    assert torch.equal(dataset[0]["image"], image)


def test_opaque_photographs_have_no_background(tmp_path):
    assert dataset_of(write_scene(tmp_path / "scene", views=2)).background_rgb is None


# ---------------------------------------------------------------------------------------------------- damage


def break_image(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not an image")
    elif how == "truncated png":
        path.write_bytes(content[: len(content) // 2])
    elif how == "broken png chunk":
        position = content.index(b"IDAT") + 20
        path.write_bytes(content[:position] + bytes(40) + content[position + 40 :])
    elif how == "truncated jpeg":
        with Image.open(path) as picture:
            picture.load()
            picture.save(path, format="JPEG")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif how == "three channels":
        with Image.open(path) as picture:
            picture.convert("RGB").save(path)
    elif how == "other size":
        with Image.open(path) as picture:
            picture.resize((48, 36)).save(path)


@pytest.mark.parametrize(
    "how", ["missing", "empty", "text", "truncated png", "broken png chunk", "truncated jpeg", "other size"]
)
def test_a_bad_image_is_named(tmp_path, how):
    scene = write_scene(tmp_path / "scene", views=3)
    path = scene / "images" / "001.png"
    break_image(path, how)
    dataset = dataset_of(scene)
    with pytest.raises(UserError) as error:
        dataset.check_sizes()
        dataset.photograph(1)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("how", ["missing", "text", "truncated png", "other size", "three channels"])
def test_a_bad_mask_is_named(tmp_path, how):
    scene = write_scene(tmp_path / "scene", views=3, masked=True)
    path = scene / "masks" / "001.png"
    break_image(path, how)
    with pytest.raises(UserError) as error:
        dataset_of(scene).photograph(1)
    assert str(path) in str(error.value)


def test_mask_color_fills_what_the_mask_leaves_out(tmp_path):
    scene = write_scene(tmp_path / "scene", views=2, masked=True)
    config = NerfstudioDataParserConfig(data=scene, eval_mode="all", mask_color=(1.0, 0.0, 1.0))
    dataset = PinholeDataset(parse(setup_dataparser(config), scene, "train"))
    image, mask = dataset.photograph(0)
    assert torch.equal(image[~mask].unique(dim=0), torch.tensor([[1.0, 0.0, 1.0]]))
    assert dataset.files(0) == [scene / "images/000.png", scene / "masks/000.png"]  # both decide the pixels
    assert json.dumps(dataset.preprocessing(0)) != json.dumps(dataset_of(scene).preprocessing(0))


def test_preprocessing_names_what_decides_the_pixels(tmp_path):
    scene = write_scene(tmp_path / "scene", views=2, lenses=OPENCV)
    descriptions = [json.dumps(dataset_of(scene, scale).preprocessing(0)) for scale in (1.0, 0.5)]
    edit_transforms(scene, k1=-0.15)
    descriptions.append(json.dumps(dataset_of(scene).preprocessing(0)))
    assert len(set(descriptions)) == 3


def test_photographs_cut_in_the_middle(tmp_path):
    scene = write_scene(tmp_path / "scene", views=2, lenses=Lens(101, 70, center=(50.0, 36.0)), masked=True)
    outputs = NerfstudioDataParserConfig(data=scene, eval_mode="all").setup().get_dataparser_outputs("train")
    whole, cut = PinholeDataset(outputs), PinholeDataset(outputs, crop=8)
    cut.check_sizes()
    assert cut.size(0) == (64, 96)
    image, mask = cut.photograph(0)
    full, full_mask = whole.photograph(0)
    assert torch.equal(image, full[3:67, 2:98]) and torch.equal(mask, full_mask[3:67, 2:98])
    assert (float(cut.cameras.cx[0]), float(cut.cameras.cy[0])) == (48.0, 33.0)  # the same rays through the same pixels
    assert cut.preprocessing(0) != whole.preprocessing(0)
    with pytest.raises(UserError, match="smaller than"):
        PinholeDataset(outputs, crop=200)
