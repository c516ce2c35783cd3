"""nerfstudio's default data parser, without its two failures on a fresh machine: open3d, and poses that spread NaN."""

from pathlib import Path

import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio, NerfstudioDataParserConfig
from nerfstudio.utils.io import load_from_json
from torch import Tensor

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.poses import check_pose


class NerfstudioParser(Nerfstudio):
    """`nerfstudio-data` whose poses are checked and whose point cloud is read with plyfile.

    nerfstudio reads the point cloud with open3d, which does not import where the system lacks libusb-1.0.
    """

    def _generate_dataparser_outputs(self, split: str = "train") -> DataparserOutputs:
        path = self.config.data if self.config.data.suffix == ".json" else self.config.data / "transforms.json"
        if path.exists():
            frames = load_from_json(path).get("frames", [])
            if not frames:
                raise UserError(f"{path} lists no images: its `frames` are empty.")
            # Before nerfstudio centres the poses: one bad pose would spoil them all, and nobody could tell which.
            for frame in frames:
                check_pose(np.asarray(frame["transform_matrix"], dtype=np.float64), f"{frame['file_path']} in {path}")
        return super()._generate_dataparser_outputs(split)

    def _load_3D_points(
        self, ply_file_path: Path, transform_matrix: Tensor, scale_factor: float
    ) -> dict[str, Tensor] | None:
        from plyfile import PlyData, PlyParseError

        try:
            vertices = PlyData.read(ply_file_path)["vertex"]
            points = torch.from_numpy(np.stack([vertices[axis] for axis in "xyz"], axis=-1).astype(np.float32))
        except (OSError, PlyParseError, KeyError, ValueError) as error:  # ValueError where there is no x, y or z
            raise UserError(
                f"The point cloud {ply_file_path} cannot be read: {error}. Restore it, or do without it: "
                "`nerfstudio-data --load-3D-points False` at the end of the command."
            ) from error
        if len(points) == 0:
            return None
        points = (points @ transform_matrix[:3, :3].T + transform_matrix[:3, 3]) * scale_factor
        return {"points3D_xyz": points}


def setup_dataparser(config: DataParserConfig) -> DataParser:
    """The parser of a configuration; nerfstudio's default format gets the parser of this module."""
    if type(config) is NerfstudioDataParserConfig:
        return NerfstudioParser(config)
    return config.setup()


def parse(parser: DataParser, data: Path, split: str) -> DataparserOutputs:
    """Read a split of a data set.

    Raises:
        UserError: the data set is missing, cannot be read, or has a pose that is no rigid motion.
    """
    if not data.exists():
        raise UserError(f"The data set {data} does not exist. --data takes the folder of a scene.")
    try:
        outputs = parser.get_dataparser_outputs(split=split)
    except ZeroDivisionError as error:  # nerfstudio divides by the largest distance of a camera from their centre
        raise UserError(
            f"All cameras of the data set {data} are in one place: it has a single image, or poses without "
            "translation. A radiance field needs views from several places."
        ) from error
    except (AssertionError, OSError, EOFError, ValueError, KeyError, RuntimeError) as error:
        # What nerfstudio's parsers raise for bad data; EOFError where they would have asked on a terminal.
        reason = f"missing key {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(
            f"The data set {data} cannot be read by nerfstudio's {type(parser.config).__name__}: {reason.strip()}. "
            "Scenes in another format need its name at the end of the command: colmap, blender-data, instant-ngp-data."
        ) from error
    if not outputs.image_filenames:
        raise UserError(f"The data set {data} has no images in its {split} split.")
    for path, pose in zip(outputs.image_filenames, outputs.cameras.camera_to_worlds.numpy(), strict=True):
        check_pose(pose, str(path))
    return outputs
