"""The decoder that new scenes start from, trained on what the fields of many scenes render."""

from pathlib import Path

import pytest
import torch
from tiny_pairs import write_pairs
from tiny_runs import assert_resumes, batch_of, generic_config, train, write_tiny

from lrf_nerfstudio.field.decoder import SceneDecoder
from lrf_nerfstudio.field.generic_decoder import FILE, load_generic, shipped_generic
from lrf_nerfstudio.training.generic_decoder import GenericDecoder
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAEConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[(4, 2), (2, 4)], ids=["cells of 4 pixels", "of 2"])
def kind(request, tmp_path_factory) -> tuple[str, int, Path]:
    """The default autoencoder, a cell, and dense pairs of two scenes, one of them with masks; sides are odd."""
    cell, density = request.param
    folder = tmp_path_factory.mktemp("generic")
    write_pairs(folder / "plain", "lrf-f4c4", "nttt", size=(75, 99), density=density)
    write_pairs(folder / "masked", "lrf-f4c4", "ntt", size=(81, 75), masked=True, density=density)
    return "lrf-f4c4", cell, folder


@pytest.mark.usefixtures("device")
def test_it_learns_beyond_the_linear_map_and_is_kept_in_a_file(tmp_path, kind):
    vae, cell, pairs = kind
    config = generic_config(
        tmp_path / "run",
        vae,
        pairs,
        cell=cell,
        steps=100,
        save_every=100,
        warmup_steps=5,
        learning_rate=1e-2,
        ema_decay=0.9,
    )
    trainer = train(config)
    task = GenericDecoder(generic_config(tmp_path / "other", vae, pairs, cell=cell, seed=1))
    batch = batch_of(task, 8)
    with torch.no_grad():
        before = task.losses(task.decoder, batch)
        trained = load_generic(config.output / FILE, task.vae)
        after = task.losses(trained, batch)
    assert isinstance(trained, SceneDecoder) and trained.config == task.decoder.config
    for term in ("l1", "dissimilarity"):
        assert after.terms[term] < 0.9 * before.terms[term]
    assert not (config.output / "config.json").exists()  # the autoencoder is as it was
    assert all(parameter.requires_grad for parameter in trainer.task.decoder.parameters())


def test_it_starts_from_the_linear_map_of_these_scenes(tmp_path, kind):
    vae, cell, pairs = kind
    task = GenericDecoder(generic_config(tmp_path / "run", vae, pairs, cell=cell))
    batch = batch_of(task, 8)
    with torch.no_grad():
        decoded = task.losses(task.decoder, batch).decoded
    counts = batch["counts"]
    gray = (batch["image"][counts] - batch["image"][counts].mean(dim=0)).square().mean()
    assert (decoded - batch["image"])[counts].square().mean() < 0.7 * gray
    assert torch.equal(decoded[~counts], batch["image"][~counts])


def test_crops_are_decoded_as_in_whole_pictures(tmp_path, kind):
    """Where the margin is as wide as what a pixel depends on."""
    vae, cell, pairs = kind
    task = GenericDecoder(generic_config(tmp_path / "run", vae, pairs, cell=cell, crop=16, margin=6 * cell // 4))
    torch.nn.init.normal_(task.decoder.tail.weight, std=0.1)
    item = task.dataset[0]
    scene, view, steps = task.dataset.scenes[0], 0, 100
    for scene in task.dataset.scenes:
        for view in scene.of_kind("train"):
            for steps in scene.latents:
                whole = scene.latent(view, steps)
                windows = whole.unfold(1, item["latent"].shape[1], 1).unfold(2, item["latent"].shape[2], 1)
                found = (windows - item["latent"][:, None, None]).abs().amax(dim=(0, 3, 4)) == 0
                if found.any():
                    row, column = (int(index) // scene.density for index in found.nonzero()[0])
                    place = [row + int(item["place"][0]), column + int(item["place"][1])]
                    with torch.no_grad():
                        picture = task.decoder(whole.permute(1, 2, 0))
                        decoded = task.losses(task.decoder, {k: v[None] for k, v in item.items()}).decoded[0]
                    top, left = (scene.spatial_factor * index for index in place)
                    counts = item["counts"]
                    expected = picture[top : top + 16, left : left + 16]
                    torch.testing.assert_close(decoded[counts], expected[counts], atol=1e-4, rtol=1e-4)
                    return
    raise AssertionError("the crop is from nowhere")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [{}, {"gan_weight": 0.5, "gan_start": 3, "discriminator": "patch"}])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, options):
    vae = write_tiny(tmp_path / "vae")
    write_pairs(tmp_path / "pairs" / "scene", vae, density=2)
    assert_resumes(lambda output: generic_config(output, vae, tmp_path / "pairs", **options), tmp_path)


def test_beside_its_vae_it_is_found(tmp_path):
    vae = VAEConfig(write_tiny(tmp_path / "vae")).setup()
    assert shipped_generic(vae) is None
    write_pairs(tmp_path / "pairs" / "scene", vae.source, density=2)
    train(generic_config(tmp_path / "run", vae.source, tmp_path / "pairs", steps=1))
    (tmp_path / "run" / FILE).rename(tmp_path / "vae" / FILE)
    assert shipped_generic(vae) == tmp_path / "vae" / FILE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 33}, "--crop 33 must be a multiple"),
        ({"cell": 3}, "--cell must divide 4"),
        ({"cell": 2}, "rendered with --density 2, and --density 4"),
        ({"batch_size": 3}, "--batch-size 3 is odd"),
        ({"pairs": Path("nowhere")}, "no pairs in nowhere"),
        ({"vae": "lrf-f4c4-base"}, "built with the VAE"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    vae = write_tiny(tmp_path / "vae")
    write_pairs(tmp_path / "pairs" / "scene", vae, density=2)
    arguments = {"vae": vae, "pairs": tmp_path / "pairs"} | options
    with pytest.raises(UserError, match=message):
        GenericDecoder(generic_config(tmp_path / "run", **arguments))
