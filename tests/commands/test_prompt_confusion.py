"""The command that compares runs of text to 3D with the objects of the small diffusion model."""

import json
from pathlib import Path

import pytest
import torch
from in_process import make_dream_trainer, make_trainer
from PIL import Image
from tiny_diffusion import make_diffusion
from tiny_vaes import make_vae

from lrf_nerfstudio.commands.prompt_confusion import NAMES, PromptConfusion, main, show
from lrf_nerfstudio.guidance import evaluation_orbit
from lrf_nerfstudio.guidance.toy_objects import OBJECTS, render_object
from lrf_nerfstudio.utils.errors import UserError


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Path:
    folder = make_diffusion(tmp_path_factory.mktemp("diffusion"))
    make_vae(folder / "vae")
    return folder


def run(diffusion: Path, output: Path, prompt: str) -> Path:
    trainer = make_dream_trainer(diffusion, output, steps=1, prompt=prompt)
    trainer.train()
    return trainer.base_dir / "config.yml"


def test_the_table_and_the_pictures(diffusion, tmp_path, capsys):
    configs = (run(diffusion, tmp_path, "a blue ball"), run(diffusion, tmp_path, "a cyan ring"))
    options = PromptConfusion(configs, tmp_path / "confusion", views=2)
    main(options)
    rows = json.loads((options.output / "confusion.json").read_text())
    assert [row["prompt"] for row in rows] == ["a blue ball", "a cyan ring"]
    assert all(list(row["likeness"]) == list(NAMES) for row in rows)
    assert all(0 <= value <= 1 for row in rows for value in row["likeness"].values())
    with Image.open(options.output / "orbits.png") as picture:
        assert picture.size == (2 * 128, 2 * 128)
    assert "of 2 runs look most like" in capsys.readouterr().out


def test_a_field_and_a_traced_object_are_seen_from_the_same_cameras(diffusion, tmp_path):
    """Gaussians all over one corner of the world cover the pixels of that corner of a traced object."""
    pipeline = make_dream_trainer(diffusion, tmp_path, steps=1).pipeline
    pipeline.eval()
    cube = next(thing for thing in OBJECTS if thing.name == "a red cube")
    corners = 0.25 * torch.cartesian_prod(*[torch.linspace(-1.0, 1.0, 6)] * 3)  # [216, 3]
    parameters = pipeline.model.gauss_params
    for name, value in parameters.items():
        value.data = value.data[:1].repeat(len(corners), *[1] * (value.ndim - 1))
        if name == "opacities":
            value.data.fill_(8.0)
    parameters["means"].data = corners
    parameters["scales"].data.fill_(-3.5)
    config = pipeline.config.orbits
    orbit = evaluation_orbit(config, pipeline.model.vae.spatial_factor)
    _, traced = render_object(cube, orbit)
    seen = show(pipeline, orbit).silhouettes
    overlap = (seen & traced).flatten(1).sum(1) / (seen | traced).flatten(1).sum(1)
    assert overlap.min() > 0.8, overlap


def test_what_cannot_be_compared_is_named(diffusion, floor_scene, tiny_vae, tmp_path):
    with pytest.raises(UserError, match="--load-config"):
        main(PromptConfusion((), tmp_path))
    with pytest.raises(UserError, match=r"no run .*config\.yml"):
        main(PromptConfusion((tmp_path / "config.yml",), tmp_path))
    with pytest.raises(UserError, match="'a corgi', is none of those"):
        main(PromptConfusion((run(diffusion, tmp_path / "other", "a corgi"),), tmp_path / "table"))
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path / "scene", steps=1)
    trainer.train()
    with pytest.raises(UserError, match="no run of latent-dreamsplat"):
        main(PromptConfusion((trainer.base_dir / "config.yml",), tmp_path / "table"))
