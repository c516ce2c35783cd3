"""Photographs with pinhole cameras: what nerfstudio's dataset gives, undistorted and checked."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.datamanagers.full_images_datamanager import _undistort_image
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image
from torch import Tensor

from lrf_nerfstudio.utils.errors import UserError, exit_on_user_error

TRANSPARENT_RGB = 1.0
"""Transparent pixels are composited over white where the data parser names no colour, as it does for Blender scenes."""


class PinholeDataset(InputDataset):
    """A data set whose cameras and images are free of lens distortion from the start.

    nerfstudio's splatting data manager undistorts all images at once and keeps them; here an image is undistorted when
    it is asked for, and `cameras` describes the undistorted images without opening any of them. Images have three
    channels: what is transparent is composited over the parser's `alpha_color`.

    Args:
        dataparser_outputs: the photographs and their cameras.
        scale_factor: resizes the photographs.
        crop: cut undistorted photographs in the middle to a multiple of so many pixels along each axis; 1 cuts nothing.
    """

    cameras: Cameras

    def __init__(self, dataparser_outputs: DataparserOutputs, scale_factor: float = 1.0, crop: int = 1):
        if dataparser_outputs.alpha_color is None:
            dataparser_outputs = replace(dataparser_outputs, alpha_color=torch.full((3,), TRANSPARENT_RGB))
        super().__init__(dataparser_outputs, scale_factor)
        self._distorted_cameras = self.cameras
        self.cameras = cropped_cameras(undistorted_cameras(self.cameras, self.image_filenames), crop)
        self.crop = crop

    @property
    def background_rgb(self) -> Float[Tensor, "3"] | None:
        """The colour behind transparent pixels, in [0, 1]; None if the first image has no transparency."""
        with open_image(self.image_filenames[0]) as image:
            return torch.as_tensor(self._dataparser_outputs.alpha_color).float() if has_alpha(image) else None

    @property
    def has_masks(self) -> bool:
        """Whether every image comes with a mask."""
        return self._dataparser_outputs.mask_filenames is not None

    def size(self, image_idx: int) -> tuple[int, int]:
        """(H, W) of the undistorted image."""
        return int(self.cameras.height[image_idx]), int(self.cameras.width[image_idx])

    def preprocessing(self, image_idx: int) -> dict[str, Any]:
        """Everything besides the file's content that decides the pixels of an image, as plain values."""
        camera = self._distorted_cameras[image_idx].reshape(())
        description: dict[str, Any] = {
            "scale_factor": self.scale_factor,
            "alpha_color": torch.as_tensor(self._dataparser_outputs.alpha_color).tolist(),
            "mask_color": self.mask_color,
        }
        if self.crop > 1:
            description["crop"] = self.crop
        if not is_pinhole(camera):
            description["undistort"] = {
                "type": int(camera.camera_type),
                "K": camera.get_intrinsics_matrices().tolist(),
                "distortion": camera.distortion_params.tolist(),
                "size": [int(camera.width), int(camera.height)],
            }
        return description

    def files(self, image_idx: int) -> list[Path]:
        """The files that an item is read from: the photograph and, where its colour enters the pixels, the mask."""
        paths = [self.image_filenames[image_idx]]
        if self.mask_color and self.has_masks:
            paths.append(self._dataparser_outputs.mask_filenames[image_idx])
        return paths

    def check_sizes(self) -> None:
        """Compare every image's size, read from its header, with its camera's.

        Raises:
            UserError: a file is missing, is no image, or has another size than its camera.
        """
        for index, path in enumerate(self.image_filenames):
            with open_image(path) as image:
                self._check_size(index, *image.size)

    def _check_size(self, index: int, width: int, height: int) -> None:
        camera = self._dataparser_outputs.cameras[index]  # before `scale_factor`
        expected = int(camera.width), int(camera.height)
        if (width, height) != expected:
            raise UserError(
                f"The image {self.image_filenames[index]} is {width} x {height} pixels, but its camera is "
                f"{expected[0]} x {expected[1]}. Correct w and h of that camera, or restore the image."
            )

    def _scaled_size(self, index: int) -> tuple[int, int]:
        """(W, H) of an image after `scale_factor` and before undistortion."""
        return int(self._distorted_cameras.width[index]), int(self._distorted_cameras.height[index])

    def get_numpy_image(self, image_idx: int) -> UInt8[np.ndarray, "h w c"]:
        path = self.image_filenames[image_idx]
        with open_image(path) as image:
            self._check_size(image_idx, *image.size)
            try:
                if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip to 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGBA" if has_alpha(image) else "RGB")
            except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
                raise _unreadable(path, error) from error
            if self.scale_factor != 1.0:
                image = image.resize(self._scaled_size(image_idx), resample=Image.Resampling.BILINEAR)
            return np.array(image, dtype=np.uint8)

    def _mask(self, image_idx: int) -> Bool[Tensor, "h w 1"]:
        """A mask before undistortion: true where a pixel counts."""
        path = self._dataparser_outputs.mask_filenames[image_idx]
        with open_image(path) as image:
            camera, channels = self._dataparser_outputs.cameras[image_idx], len(image.getbands())
            if image.size != (int(camera.width), int(camera.height)) or channels != 1:
                raise UserError(
                    f"The mask {path} is {image.width} x {image.height} pixels with {channels} channels. A mask has "
                    f"one channel and the size of its photograph, {int(camera.width)} x {int(camera.height)}."
                )
            try:
                mask = np.array(image.resize(self._scaled_size(image_idx), resample=Image.Resampling.NEAREST))
            except (OSError, SyntaxError) as error:
                raise _unreadable(path, error) from error
        return torch.from_numpy(mask != 0)[..., None]

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        """Read and undistort an item.

        Returns:
            `image_idx`, `image` [H, W, 3] (in [0, 1] unless `image_type` is uint8) and, if there are masks, `mask`
            [H, W, 1], true where a pixel counts.

        Raises:
            UserError: a file is missing, damaged, or of another size than its camera.
        """
        image, mask = self.get_image_float32(image_idx), self._mask(image_idx) if self.has_masks else None
        if mask is not None and self.mask_color:
            image = torch.where(mask, image, torch.tensor(self.mask_color))
        camera = self._distorted_cameras[image_idx].reshape(())
        if not is_pinhole(camera):
            # Inverted, so that a pixel does not count that is interpolated between one that does and one that does not.
            masks = {} if mask is None else {"mask": ~mask}
            _, undistorted, inverted = _undistort(camera, image.numpy(), masks, self.image_filenames[image_idx])
            image, mask = torch.from_numpy(undistorted), None if inverted is None else ~inverted
        image, mask = self._cut(image), None if mask is None else self._cut(mask)
        data = {"image_idx": image_idx, "image": image if image_type == "float32" else (255 * image).to(torch.uint8)}
        if mask is not None:
            data["mask"] = mask
        return data

    def _cut(self, image: Tensor) -> Tensor:
        """The middle of an undistorted image or mask [H, W, ...]."""
        (top, height), (left, width) = (_middle(length, self.crop) for length in image.shape[:2])
        return image[top : top + height, left : left + width]

    @exit_on_user_error()
    def __getitem__(self, image_idx: int) -> dict[str, Any]:
        """What nerfstudio's viewer and ns-render take pictures from: `get_data`."""
        return self.get_data(image_idx)

    def photograph(self, image_idx: int) -> tuple[Float[Tensor, "h w 3"], Tensor | None]:
        """The image in [0, 1], and its mask [h, w] (True: counts) if there is one."""
        data = self.get_data(image_idx)
        return data["image"], data["mask"][..., 0] if "mask" in data else None


def is_pinhole(camera: Cameras) -> bool:
    """Whether a single camera is a perspective camera without lens distortion."""
    distorted = camera.distortion_params is not None and bool(torch.any(camera.distortion_params != 0))
    return int(camera.camera_type) == CameraType.PERSPECTIVE.value and not distorted


def undistorted_cameras(cameras: Cameras, files: Sequence[Path]) -> Cameras:
    """The pinhole cameras of the undistorted images; no image is opened.

    Args:
        cameras: of the images.
        files: the images, for messages.

    Raises:
        UserError: a lens model is not known, or has parameters with which an image cannot be undistorted.
    """
    Ks = cameras.get_intrinsics_matrices().clone()  # [N, 3, 3]
    sizes = torch.cat([cameras.width, cameras.height], dim=-1)  # [N, 2]
    seen: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}
    for index in range(len(cameras)):
        camera = cameras[index].reshape(())
        if is_pinhole(camera):
            continue
        width, height = sizes[index].tolist()
        key = (*Ks[index].flatten().tolist(), *camera.distortion_params.tolist(), width, height)
        if key not in seen:
            K, image, _ = _undistort(camera, np.zeros((height, width, 3), dtype=np.uint8), {}, files[index])
            seen[key] = torch.from_numpy(K).to(Ks), torch.tensor([image.shape[1], image.shape[0]])
        Ks[index], sizes[index] = seen[key]
    return Cameras(
        camera_to_worlds=cameras.camera_to_worlds,
        fx=Ks[:, 0, 0:1],
        fy=Ks[:, 1, 1:2],
        cx=Ks[:, 0, 2:3],
        cy=Ks[:, 1, 2:3],
        width=sizes[:, 0:1],
        height=sizes[:, 1:2],
        camera_type=CameraType.PERSPECTIVE,
        times=cameras.times,
        metadata=cameras.metadata,
    )


def cropped_cameras(cameras: Cameras, crop: int) -> Cameras:
    """Pinhole cameras of pictures that are cut in the middle to a multiple of `crop` pixels along each axis.

    Raises:
        UserError: a picture is smaller than that.
    """
    if crop == 1:
        return cameras
    tops, heights = _middles(cameras.height, crop)
    lefts, widths = _middles(cameras.width, crop)
    if not (heights.all() and widths.all()):
        raise UserError(f"A photograph is smaller than --pipeline.datamanager.crop, {crop} pixels.")
    return Cameras(
        camera_to_worlds=cameras.camera_to_worlds,
        fx=cameras.fx,
        fy=cameras.fy,
        cx=cameras.cx - lefts,
        cy=cameras.cy - tops,
        width=widths,
        height=heights,
        camera_type=CameraType.PERSPECTIVE,
        times=cameras.times,
        metadata=cameras.metadata,
    )


def _middle(length: int, crop: int) -> tuple[int, int]:
    """Start and length of the middle part whose length is a multiple of `crop`."""
    return length % crop // 2, length - length % crop


def _middles(lengths: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """The same for lengths [N, 1]."""
    rest = lengths % crop
    return rest // 2, lengths - rest


def _undistort(
    camera: Cameras, image: np.ndarray, data: dict[str, Tensor], file: Path
) -> tuple[np.ndarray, np.ndarray, Any]:
    import cv2

    K = camera.get_intrinsics_matrices().numpy().copy()
    try:
        return _undistort_image(camera, camera.distortion_params.numpy(), data, image, K)
    except (NotImplementedError, AssertionError, cv2.error) as error:  # how nerfstudio and OpenCV refuse lenses
        raise UserError(
            f"{file} cannot be undistorted. Its camera has nerfstudio's camera type {int(camera.camera_type)}: "
            f"{error} Correct the camera, or undistort the images with COLMAP's image_undistorter, for example."
        ) from error


def has_alpha(image: Image.Image) -> bool:
    """Whether an image has transparency, as a channel or as a transparent palette entry."""
    return "A" in image.getbands() or "transparency" in image.info


def open_image(path: Path) -> Image.Image:
    """Open an image file; pixels are decoded later.

    Raises:
        UserError: the file is missing or no image.
    """
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise UserError(f"The image {path} is missing. Restore it, or remove its frame from the data set.") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"The image {path} cannot be read ({error}). Replace it, or remove its frame from the data set.")
