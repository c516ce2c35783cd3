"""Pairs for stage III: what fields render is what is stored, and nothing is lost by a kill or by a scene that fails."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import wait_until
from in_process import make_trainer
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from test_trainer import assert_equal
from tiny_scenes import Lens, write_scene
from tiny_vaes import make_vae

from lrf_nerfstudio.commands import build_stage3_pairs, set_vae
from lrf_nerfstudio.plugin.fitting import FieldFit, FittingConfig, trainer_config
from lrf_nerfstudio.plugin.pair_building import CONTACT_SHEET, PairConfig, build_scene, build_scenes, render_views
from lrf_nerfstudio.training.data.scene_pairs import INDEX, ScenePairs, read_pairs
from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.stage3 import Stage3, Stage3Config
from lrf_nerfstudio.utils.cli import run
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, VAEConfig

pytestmark = pytest.mark.slow

RUN = Path("field", "latent-splatfacto", "run")


@pytest.fixture(scope="module")
def vae(tiny_vae: Path) -> VAE:
    return VAEConfig(str(tiny_vae)).setup()


def contents(pairs: ScenePairs) -> dict[str, torch.Tensor]:
    """All tensors of a scene's pairs."""
    latents = {
        f"{steps}.{view}": pairs.latent(view, steps) for steps in pairs.latents for view in range(len(pairs.views))
    }
    photographs = {f"photograph.{view}": pairs.photograph(view)[0] for view in range(len(pairs.views))}
    return latents | photographs


@pytest.fixture(scope="module")
def built(floor_scene, vae, tmp_path_factory) -> ScenePairs:
    """The pairs of a scene of 17 views of 101 x 67 pixels, after 20 and 60 steps. Tests must not change them."""
    return build_scene(floor_scene, vae, tmp_path_factory.mktemp("built"), PairConfig(steps=60, snapshots=(20,)))


def test_pairs_are_photographs_beside_what_the_field_renders(built, floor_scene, vae):
    (read,) = read_pairs(built.folder.parent, vae)
    assert read == built and list(built.latents) == [20, 60]
    names = {kind: [built.views[view].name for view in built.of_kind(kind)] for kind in ("train", "novel")}
    assert names["novel"] == ["000.png", "008.png", "016.png"]  # every 8th, from the first
    assert sorted(names["train"] + names["novel"]) == [f"{index:03d}.png" for index in range(17)]
    for index, view in enumerate(built.views):
        with Image.open(floor_scene / "images" / view.name) as image:
            expected = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(67, 101, 3)
        photograph, mask = built.photograph(index)
        assert torch.equal(photograph, expected) and mask is None

    # The run is one of nerfstudio's: what its commands load renders the same.
    _, pipeline, _, step = eval_setup(built.folder / RUN / "config.yml", test_mode="test")
    assert step == 59
    for index, latent in enumerate(render_views(pipeline, density=1)):
        torch.testing.assert_close(built.latent(index, 60), latent, rtol=1e-5, atol=1e-5)
    view = built.of_kind("novel")[1]
    camera, _ = pipeline.datamanager.eval_view(1)
    torch.testing.assert_close(
        pipeline.model.render(camera)["latent"], built.latent(view, 60).to(pipeline.model.device), rtol=1e-5, atol=1e-5
    )
    assert_equal(dict(pipeline.model.normalization.state_dict()), dict(built.normalization.state_dict()))
    with Image.open(built.folder / CONTACT_SHEET) as sheet:
        assert sheet.size == (2 * 101, 4 * (67 + 4))


def test_dense_pairs_show_the_same_field(built, floor_scene, vae, tmp_path):
    """What is built of a run that is there already is of the same field, on the grid of a scene's decoder."""
    shutil.copytree(built.folder / "field", tmp_path / floor_scene.name / "field")
    dense = build_scene(floor_scene, vae, tmp_path, PairConfig(steps=60, density=4))
    (read,) = read_pairs(tmp_path, vae, density=4)
    assert read == dense
    for view in range(len(dense.views)):
        latent, coarse = dense.latent(view, 60), built.latent(view, 60)
        assert latent.shape == (coarse.shape[0], 4 * coarse.shape[1], 4 * coarse.shape[2])
        means = torch.nn.functional.avg_pool2d(latent, 4)
        assert (means - coarse).abs().mean() < 0.1 * coarse.std()
        assert torch.equal(dense.photograph(view)[0], built.photograph(view)[0])
    with pytest.raises(UserError, match="--density 4, and --density 1 is needed"):
        read_pairs(tmp_path, vae)
    with pytest.raises(UserError, match="density is 4, not 2"):
        build_scene(floor_scene, vae, tmp_path, PairConfig(steps=60, density=2))


def test_fields_are_those_of_ns_train(built, floor_scene, tiny_vae, tmp_path):
    torch.manual_seed(42)  # the seed of nerfstudio's machine configuration
    trainer = make_trainer(floor_scene, tiny_vae, tmp_path, 60, scene_decoder__share=0.0)
    trainer.train()
    (path,) = (built.folder / RUN / "nerfstudio_models").iterdir()
    expected, actual = trainer.pipeline.state_dict(), torch.load(path, weights_only=True)["pipeline"]
    for name in ("means", "features_dc", "opacities"):
        key = f"_model.gauss_params.{name}"
        torch.testing.assert_close(actual[key], expected[key].cpu(), rtol=0, atol=0)


def test_a_finished_scene_is_skipped_and_what_is_missing_is_made_again(built, floor_scene, vae, tmp_path, monkeypatch):
    output = tmp_path / "pairs"
    shutil.copytree(built.folder, output / built.folder.name)
    folder, config = output / built.folder.name, PairConfig(steps=60, snapshots=(20,))
    expected = contents(built)
    fits = []
    init = FieldFit.__init__
    monkeypatch.setattr(FieldFit, "__init__", lambda self, *a, **k: (fits.append(0), init(self, *a, **k))[1])
    assert build_scene(floor_scene, vae, output, config).latents == built.latents
    (folder / CONTACT_SHEET).unlink()
    build_scene(floor_scene, vae, output, config)
    assert not fits and (folder / CONTACT_SHEET).exists()

    for name in ("latents-0000060.safetensors", "photographs-0001.safetensors", "latents-0000020.safetensors", "field"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert_equal(contents(build_scene(floor_scene, vae, output, config)), expected)
    assert len(fits) == 3


def test_pairs_of_another_kind_are_not_mixed(built, floor_scene, vae, tmp_path):
    output = built.folder.parent
    with pytest.raises(UserError, match=r"their steps is 60, not 50.*another --output"):
        build_scene(floor_scene, vae, output, PairConfig(steps=50, snapshots=(20,)))
    other = VAEConfig(str(make_vae(tmp_path / "other", seed=1))).setup()
    with pytest.raises(UserError, match="VAE fingerprint"):
        build_scene(floor_scene, other, output, PairConfig(steps=60, snapshots=(20,)))
    namesake = write_scene(tmp_path / floor_scene.name)
    with pytest.raises(UserError, match="their scene is"):
        build_scene(namesake, vae, output, PairConfig(steps=60, snapshots=(20,)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file could not be written: .* \(--output\)"):
        build_scenes([floor_scene], vae, tmp_path / "file", PairConfig(steps=60))


def test_masks_are_stored(tiny_vae, vae, tmp_path):
    scene = write_scene(tmp_path / "scene", masked=True, lenses=Lens(width=96, height=72))
    pairs = build_scene(scene, vae, tmp_path / "pairs", PairConfig(steps=2))
    for view in range(len(pairs.views)):
        _, mask = pairs.photograph(view)
        assert mask is not None and mask.shape == (72, 96) and not mask[:, :32].any() and mask[:, 32:].all()


def test_photographs_of_many_sizes_with_distortion(vae, tmp_path):
    lenses = [Lens(90, 70, distortion={"k1": 0.1}), Lens(81, 67)]
    scene = write_scene(tmp_path / "scene", lenses=lenses)
    pairs = build_scene(scene, vae, tmp_path / "pairs", PairConfig(steps=2))
    for index, view in enumerate(pairs.views):
        assert pairs.photograph(index)[0].shape == (view.height, view.width, 3)
        assert pairs.latent(index, 2).shape == (4, *pairs.grid(index))
    assert len({(view.height, view.width) for view in pairs.views}) == 2


def run_script(*arguments: object) -> None:
    run(build_stage3_pairs.main, [*map(str, arguments)])


def test_a_scene_that_fails_is_reported_and_the_others_go_on(floor_scene, tiny_vae, tmp_path, capsys):
    broken, other = write_scene(tmp_path / "broken"), write_scene(tmp_path / "other")
    (broken / "images" / "003.png").write_bytes(b"no image")
    single = write_scene(tmp_path / "single", views=1)
    arguments = ["--vae", tiny_vae, "--output", tmp_path / "pairs", "--steps", 3, "--scenes"]
    with pytest.raises(SystemExit) as stopped:
        run_script(*arguments, broken, single, floor_scene, tmp_path / "nowhere", other)
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert (
        "003.png cannot be read" in said.err and "are in one place" in said.err and "nowhere does not exist" in said.err
    )
    assert "Error: 3 of 5 scenes failed" in said.err and "Traceback" not in said.err + said.out
    made = [scene.folder.name for scene in read_pairs(tmp_path / "pairs", VAEConfig(str(tiny_vae)).setup())]
    assert made == [floor_scene.name, "other"]

    write_scene(tmp_path / "mended")
    shutil.copytree(tmp_path / "mended" / "images", broken / "images", dirs_exist_ok=True)
    run_script(*arguments, broken, floor_scene, other)
    assert (tmp_path / "pairs" / "broken" / INDEX).exists()


def test_processes_share_the_scenes(tmp_path, tiny_vae, capsys):
    scenes = [tmp_path / name for name in "abcde"]
    shards = []
    for index in range(2):
        options = build_stage3_pairs.BuildPairs(scenes=tuple(scenes), num_shards=2, shard_index=index)
        shards.append([path.name for path in build_stage3_pairs.select(options)])
    assert shards == [["a", "c", "e"], ["b", "d"]]
    for arguments, message in (
        (("--shard-index", 2, "--num-shards", 2, "--scenes", "a"), "--shard-index must be 0 to 1"),
        (("--scenes", "x/a", "y/a"), "two of --scenes are called a"),
        ((), "--scenes A B"),
        (("--scenes", "a", "--vae", "no-such-vae"), "no-such-vae"),
    ):
        with pytest.raises(SystemExit):
            run_script(*arguments, "--output", tmp_path / "pairs")
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "pairs").exists()


def build(scene: Path, vae: Path, output: Path) -> None:
    """What the killed process runs; checkpoints every 40 steps."""
    from lrf_nerfstudio.plugin.method import latent_splatfacto

    latent_splatfacto.config.steps_per_save = 40
    build_scene(scene, VAEConfig(str(vae)).setup(), output, PairConfig(steps=300, snapshots=(100, 200)))


@pytest.mark.parametrize("after", ["index.json", "latents-0000100.safetensors", "latents-0000300.safetensors"])
def test_kill_9_at_any_time(floor_scene, tiny_vae, tmp_path, forked, after):
    """Whenever a process is killed, the pairs that are there can be read, and a second run ends with all of them."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = forked.context.Process(target=build, args=(floor_scene, tiny_vae, killed))
    process.start()
    folder = killed / floor_scene.name
    wait_until(lambda: (folder / after).exists() or process.exitcode is not None, timeout=120)
    process.kill()
    process.join()
    vae = VAEConfig(str(tiny_vae)).setup()
    if (folder / INDEX).exists():
        assert not ScenePairs.load(folder).missing_files()
    for output in (killed, straight):
        process = forked.context.Process(target=build, args=(floor_scene, tiny_vae, output))
        process.start()
        process.join(120)
        assert process.exitcode == 0
    (actual,), (expected,) = read_pairs(killed, vae), read_pairs(straight, vae)
    assert list(actual.latents) == [100, 200, 300] and actual.views == expected.views
    assert_equal(contents(actual), contents(expected))


# ---------------------------------------------------------------------------------------------------- another decoder


def test_a_trained_scene_decodes_with_another_decoder(built, tiny_vae, tmp_path, forked):
    tuned = VAEConfig(str(tiny_vae)).setup()
    tuned.autoencoder.decoder.layers[-1].bias += 0.25
    tuned.save(tmp_path / "tuned", dtype=torch.float32)
    load_config = built.folder / RUN / "config.yml"
    written = set_vae.set_vae(set_vae.SetVAE(load_config, str(tmp_path / "tuned"), tmp_path / "config-tuned.yml"))
    before = load_config.read_bytes()
    forked("ns-eval", "--load-config", written, "--output-path", tmp_path / "tuned.json").check()
    forked("ns-eval", "--load-config", load_config, "--output-path", tmp_path / "before.json").check()
    results = [json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("before", "tuned")]
    assert results[0]["latent_psnr"] == pytest.approx(results[1]["latent_psnr"])
    assert abs(results[0]["ceiling_psnr"] - results[1]["ceiling_psnr"]) > 0.1
    assert abs(results[0]["psnr"] - results[1]["psnr"]) > 0.1
    assert load_config.read_bytes() == before


def test_set_vae_names_mistakes(built, tmp_path):
    load_config, other = built.folder / RUN / "config.yml", str(make_vae(tmp_path / "other", seed=1))
    (tmp_path / "some.yml").write_text("a: 1\n")
    for config, vae, message in (
        (load_config, other, r"has another encoder.*ns-train latent-splatfacto"),
        (load_config, "no-such-vae", "no-such-vae"),
        (tmp_path / "nowhere.yml", other, r"nowhere.yml \(--load-config\) cannot be read"),
        (tmp_path / "some.yml", other, "not of a scene that latent-splatfacto trained"),
    ):
        with pytest.raises(UserError, match=message):
            set_vae.set_vae(set_vae.SetVAE(config, vae))
    assert not list(load_config.parent.glob("config-*"))


def test_a_checkpoint_beyond_what_is_missing_is_not_taken_up(floor_scene, tiny_vae, tmp_path):
    def fit(latest: int | None = None) -> FieldFit:
        return FieldFit(trainer_config(floor_scene, str(tiny_vae), tmp_path, FittingConfig(steps=4)), latest)

    first = fit()
    first.run([], lambda steps: None)
    assert fit().steps == 4
    assert fit().cost == first.cost and first.cost["seconds"] > 0  # known without being fitted again
    assert fit(latest=4).steps == 4
    anew = fit(latest=3)
    assert anew.steps == 0 and anew.cost == {}


@pytest.mark.realdata
def test_a_real_decoder_gets_better_on_what_a_real_field_renders(real_data, tmp_path):
    taesd = str(real_data / "weights" / "taesd")
    config = PairConfig(steps=200, downscale_factor=2)
    build_scene(real_data / "scenes" / "banana", VAEConfig(taesd).setup(), tmp_path / "pairs", config)
    options = Stage3Config(
        output=tmp_path / "run",
        vae=taesd,
        pairs=tmp_path / "pairs",
        crop=64,
        steps=15,
        save_every=15,
        warmup_steps=3,
        learning_rate=2e-4,
        ema_decay=0.5,
        workers=0,
        tensorboard=False,
        device="cpu",
    )
    Trainer(options, Stage3(options)).run()
    task = Stage3(replace(options, seed=1))
    batch = torch.utils.data.default_collate([task.dataset[index] for index in range(12)])
    losses = []
    for source in (taesd, str(options.output)):
        task.vae.load_state_dict(VAEConfig(source).setup().state_dict())
        with torch.no_grad():
            losses.append(task.losses(task.network, batch).terms)
    before, after = losses
    for kind in ("train", "novel"):
        assert after[kind] < 0.95 * before[kind]
