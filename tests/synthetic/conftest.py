"""One training scene for all tests of this folder."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def training_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training scene of seed 3: 17 views of 72 x 96. Tests must not change it."""
    from lrf_nerfstudio.commands.make_training_scenes import TrainingScenes, main

    folder = tmp_path_factory.mktemp("training")
    main(TrainingScenes(output=folder, count=1, first_seed=3, views=17, size=(72, 96), points=1500))
    return folder / "scene_00003"
