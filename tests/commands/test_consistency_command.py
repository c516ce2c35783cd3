"""The command that measures view consistency, from trained scenes to its files."""

import json

import pytest
import torch
from in_process import make_trainer
from PIL import Image

from lrf_nerfstudio.commands import consistency
from lrf_nerfstudio.utils.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def configs(floor_scene, tiny_vae, tmp_path_factory):
    """A scene with a decoder of its own, one without, and one in RGB, all trained for some steps."""
    found = []
    for source, share, steps in ((str(tiny_vae), 0.5, 240), (str(tiny_vae), 0.0, 160), ("rgb", 0.0, 160)):
        folder = tmp_path_factory.mktemp("trained")
        make_trainer(floor_scene, source, folder, steps, scene_decoder__share=share).train()
        found += folder.rglob("config.yml")
    return tuple(found)


def test_every_kind_of_picture_is_measured(configs, tmp_path, floor_scene, capsys):
    options = consistency.Consistency(configs, tmp_path / "measures", ways=2, steps=3, tolerance=0.1)
    consistency.main(options)
    rows = json.loads((options.output / "consistency.json").read_text())
    kinds = {"the scene's decoder", "the VAE", "latent_rgb"}
    number = 0
    for expected in (kinds, kinds - {"the scene's decoder"}, {"RGB"}):
        for cameras, more in (("next to each other", set()), ("ends", {"photograph"})):
            of_cameras = rows[number : number + len(expected | more)]
            assert {row["picture"] for row in of_cameras} == expected | more
            assert {row["cameras"] for row in of_cameras} == {cameras}
            assert all(row["scene"] == floor_scene.name and 0 < row["seen"] <= 1 for row in of_cameras)
            assert all(0 < row["psnr"] < 100 for row in of_cameras)
            assert all(row["pairs"] <= (6 if cameras != "ends" else 2) for row in of_cameras)
            number += len(of_cameras)
    assert number == len(rows)
    sizes = []
    for index in range(3):
        with Image.open(options.output / f"{index}-{floor_scene.name}.png") as picture:
            sizes.append(picture.size)
    assert sizes == [(4 * 101, 3 * 67), (4 * 101, 2 * 67), (4 * 101, 67)]
    assert "latent_rgb" in capsys.readouterr().out


def test_a_way_leads_from_one_camera_to_the_other(configs):
    from nerfstudio.utils.eval_utils import eval_setup

    _, pipeline, _, _ = eval_setup(configs[0], test_mode="test")
    train, held_out = pipeline.datamanager.train_dataset.cameras, pipeline.datamanager.eval_dataset.cameras
    (first, last), *_ = consistency.chosen_ends(pipeline, 2)
    distances = (train.camera_to_worlds[:, :3, 3] - held_out.camera_to_worlds[first, :3, 3]).norm(dim=-1)
    assert int(distances.argmin()) == last
    cameras = list(consistency.way(held_out[first : first + 1], train[last : last + 1], 4))
    assert len(cameras) == 5
    for camera, expected in ((cameras[0], held_out[first]), (cameras[-1], train[last])):
        torch.testing.assert_close(camera.camera_to_worlds[0], expected.camera_to_worlds, atol=1e-5, rtol=0)
    steps = torch.stack([camera.camera_to_worlds[0, :, 3] for camera in cameras]).diff(dim=0)
    torch.testing.assert_close(steps, steps[:1].expand(4, 3), atol=1e-5, rtol=1e-4)


def test_nothing_to_measure_is_named(tmp_path):
    with pytest.raises(UserError, match="--load-config"):
        consistency.main(consistency.Consistency((), tmp_path))
