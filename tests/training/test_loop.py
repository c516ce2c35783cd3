import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from shifted_views import shifted_views
from tiny_runs import assert_resumes, assert_same_end, stage1_config, state, train, weights, write_kl, write_tiny

from lrf_nerfstudio.training.checkpoint import CHECKPOINT
from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.stage1 import Stage1
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAEConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return [shifted_views(tmp_path_factory.mktemp("views"))]


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    return write_tiny(tmp_path_factory.mktemp("vae"))


on_devices = pytest.mark.usefixtures("device")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@on_devices
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gan_weight": 0.5, "gan_start": 3, "feature_weight": 0.1},
        {"gan_weight": 0.5, "gan_start": 3, "discriminator": "patch", "tune": "decoder"},
        {"gradient_accumulation": 2},
        {"report_every": 4},
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, scenes, vae, weights_in_cache, options):
    assert_resumes(lambda output: stage1_config(output, vae, **options), tmp_path, scenes)


@on_devices
def test_posterior_noise_is_the_same_after_a_resume(tmp_path, scenes):
    vae = write_kl(tmp_path / "vae")
    assert_resumes(lambda output: stage1_config(output, vae), tmp_path, scenes)


ONLY_MEANS = {f"{term}_weight": 0.0 for term in ("correspondence", "deviation", "regularization")}
"""Leaves a loss that is a mean over samples. The latents' deviation is that of what a process computes at once."""


def assert_same_way(actual: Path, expected: Path, untouched: Path) -> None:
    """Two runs went the same way; Adam makes much of gradients that are zero but for rounding, so not to the bit."""
    way = (weights(expected) - weights(untouched)).norm()
    assert (weights(actual) - weights(expected)).norm() < 0.03 * way


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path, scenes, vae):
    train(stage1_config(tmp_path / "large", vae, batch_size=4, **ONLY_MEANS), scenes)
    train(stage1_config(tmp_path / "small", vae, batch_size=1, gradient_accumulation=4, **ONLY_MEANS), scenes)
    untouched = stage1_config(tmp_path / "untouched", vae)
    Trainer(untouched, Stage1(untouched, scenes))
    assert_same_way(tmp_path / "small", tmp_path / "large", tmp_path / "untouched")


@on_devices
def test_the_moving_average_is_what_is_written(tmp_path, scenes, vae):
    config = stage1_config(tmp_path / "run", vae, ema_decay=0.5)
    trainer = train(config, scenes)
    written = VAEConfig(str(config.output)).setup().autoencoder
    for average, parameter in zip(trainer.ema.shadow_params, written.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), average.cpu(), rtol=0, atol=0)
    differences = [
        (average - parameter).abs().max().item()
        for average, parameter in zip(trainer.ema.shadow_params, trainer.task.network.parameters(), strict=True)
    ]
    assert max(differences) > 1e-6


def test_learning_rates_rise_and_fall(tmp_path, scenes, vae):
    config = stage1_config(tmp_path / "run", vae, steps=8, warmup_steps=2, learning_rate=1e-3)
    trainer = Trainer(config, Stage1(config, scenes))
    rates = []
    train_on = trainer.train_on
    trainer.train_on = lambda batch: (rates.append(trainer.scheduler.get_last_lr()[0]), train_on(batch))[1]
    trainer.run()
    assert rates[:3] == [0.0, 5e-4, 1e-3]
    assert rates[5] == pytest.approx(5e-4) and rates[7] == pytest.approx(6.7e-5, rel=0.01)


@on_devices
def test_gradients_are_clipped(tmp_path, scenes, vae):
    config = stage1_config(tmp_path / "run", vae, max_gradient_norm=1e-3, steps=1)
    trainer = Trainer(config, Stage1(config, scenes))
    norms = []

    def record(optimizer, *arguments):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    trainer.optimizer.optimizer.register_step_pre_hook(record)
    trainer.run()
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


@on_devices
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights(tmp_path, scenes, vae):
    plain = train(stage1_config(tmp_path / "float32", vae), scenes)
    AcceleratorState._reset_state()  # which would else keep the precision of the first run
    mixed = train(stage1_config(tmp_path / "bfloat16", vae, mixed_precision="bf16"), scenes)
    weights = [
        torch.cat([p.detach().flatten() for p in trainer.task.network.parameters()]) for trainer in (plain, mixed)
    ]
    assert weights[1].dtype == torch.float32
    assert not torch.equal(*weights)
    torch.testing.assert_close(*weights, atol=0.02, rtol=0.05)


def test_float16_needs_a_gpu(tmp_path, scenes, vae):
    config = stage1_config(tmp_path / "float16", vae, mixed_precision="fp16")
    with pytest.raises(UserError, match="fp16"):
        Trainer(config, Stage1(config, scenes))


def test_the_adversarial_loss_trains_the_decoder_from_its_start_step_on(tmp_path, scenes, vae, weights_in_cache):
    train(stage1_config(tmp_path / "without", vae, steps=4), scenes)
    train(stage1_config(tmp_path / "late", vae, steps=4, gan_weight=0.5, gan_start=4), scenes)
    train(stage1_config(tmp_path / "early", vae, steps=4, gan_weight=0.5, gan_start=2), scenes)
    without, late, early = (state(tmp_path / name) for name in ("without", "late", "early"))
    for name, weight in without["network"].items():
        torch.testing.assert_close(late["network"][name], weight, rtol=0, atol=0)
    assert any(not torch.equal(early["network"][name], weight) for name, weight in without["network"].items())
    first = stage1_config(tmp_path / "first", vae, gan_weight=0.5)
    before = Trainer(first, Stage1(first, scenes)).adversary.state_dict()["discriminator"]
    assert any(not torch.equal(late["discriminator"][name], weight) for name, weight in before.items())


def test_weights_that_are_missing_are_said_before_anything_is_written(tmp_path, scenes, vae, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = stage1_config(tmp_path / "run", vae, gan_weight=0.5)
    advice = "Allow their download with --download-weights, or choose --discriminator patch"
    with pytest.raises(UserError, match=f"tf_efficientnet_lite0.*pth is missing.*{advice}"):
        Trainer(config, Stage1(config, scenes))
    assert not config.output.exists()


def test_a_run_is_not_continued_with_a_loss_that_it_began_without(tmp_path, scenes, vae, torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = stage1_config(tmp_path / "run", vae, feature_weight=0.1, steps=2)
    train(config, scenes)
    config.resume = True
    train(config, scenes)
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    with pytest.raises(UserError, match=r"its reconstruction terms is \['l1'\], not \['l1', 'features'\]"):
        train(config, scenes)


@on_devices
@pytest.mark.parametrize("term", ["l1", "correspondence"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, scenes, vae, term, monkeypatch):
    config = stage1_config(tmp_path / "run", vae, steps=8, save_every=3, report_every=10)
    task = Stage1(config, scenes)
    trainer = Trainer(config, task)
    losses, calls = task.losses, []

    def poisoned(network, batch):
        result = losses(network, batch)
        calls.append(0)
        if len(calls) == 5:
            result.terms[term] = result.terms[term] * float("nan")
        return result

    monkeypatch.setattr(task, "losses", poisoned)
    with pytest.raises(UserError, match=rf"Steps 4 to 6: .*{term}.* not finite.*checkpoint.*kept"):
        trainer.run()
    kept = state(config.output)
    assert kept["step"] == 3
    assert all(torch.isfinite(weight).all() for weight in kept["network"].values())


@on_devices
@pytest.mark.parametrize("owner", ["network", "discriminator"])
def test_weights_that_are_not_finite_are_not_written(tmp_path, scenes, vae, owner):
    """Though no loss has seen them yet."""
    config = stage1_config(tmp_path / "run", vae, gan_weight=0.5, gan_start=9, discriminator="patch")
    trainer = Trainer(config, Stage1(config, scenes))
    poisoned = trainer.network if owner == "network" else trainer.adversary.network
    train_on = trainer.train_on

    def train_and_poison(batch):
        train_on(batch)
        if trainer.step == 3:
            with torch.no_grad():
                list(poisoned.parameters())[-1].mul_(float("inf"))

    trainer.train_on = train_and_poison
    with pytest.raises(UserError, match=r"Step 4: a weight is not finite.*checkpoint.*kept"):
        trainer.run()
    assert state(config.output)["step"] == 2


def test_another_run_in_the_output_folder_is_left_alone(tmp_path, scenes, vae):
    config = stage1_config(tmp_path / "run", vae, steps=2)
    train(config, scenes)
    before = files(config.output)
    with pytest.raises(UserError, match="holds a run already"):
        Trainer(config, Stage1(config, scenes))
    for name, value in {"learning_rate": 5e-4, "crop": 16, "correspondence_weight": 0.7, "batch_size": 1}.items():
        other = stage1_config(config.output, vae, steps=2, resume=True, **{name: value})
        with pytest.raises(UserError, match=f"belongs to another run: its {name.replace('_', ' ')} is"):
            Trainer(other, Stage1(other, scenes))
    retrained = VAEConfig(vae).setup()
    retrained.autoencoder.encoder.layers[0].bias += 1.0
    retrained.save(tmp_path / "other vae")
    os.rename(tmp_path / "other vae", moved := tmp_path / "moved")
    other = stage1_config(config.output, str(moved), steps=2, resume=True)
    with pytest.raises(UserError, match="belongs to another run: its vae is"):
        Trainer(other, Stage1(other, scenes))
    assert files(config.output) == before


def test_a_folder_with_other_things_is_not_written_to(tmp_path, scenes, vae):
    before = files(Path(vae))
    config = stage1_config(Path(vae), vae)
    with pytest.raises(UserError, match="is not empty"):
        Trainer(config, Stage1(config, scenes))
    assert files(Path(vae)) == before
    config = stage1_config(tmp_path / "nothing", vae, resume=True)
    with pytest.raises(UserError, match="no run to --resume"):
        Trainer(config, Stage1(config, scenes))
    assert not config.output.exists()


def test_an_autoencoder_that_was_replaced_under_its_name_is_noticed(tmp_path, scenes, vae):
    copy = tmp_path / "vae"
    VAEConfig(vae).setup().save(copy, dtype=torch.float32)
    config = stage1_config(tmp_path / "run", str(copy), steps=2)
    train(config, scenes)
    changed = VAEConfig(vae).setup()
    changed.autoencoder.encoder.layers[0].bias += 1.0
    changed.save(copy, dtype=torch.float32)
    config.resume = True
    with pytest.raises(UserError, match="belongs to another run: its autoencoder is"):
        train(config, scenes)


def test_a_run_that_was_killed_before_its_autoencoder_was_written_writes_it_when_resumed(tmp_path, scenes, vae):
    config = stage1_config(tmp_path / "run", vae)
    train(config, scenes)
    weights = config.output / "diffusion_pytorch_model.safetensors"
    complete = weights.read_bytes()
    VAEConfig(vae).setup().save(config.output)  # that of an earlier checkpoint, say
    config.resume = True
    train(config, scenes)
    assert weights.read_bytes() == complete


def test_a_malicious_checkpoint_is_not_run(tmp_path, scenes, vae):
    config = stage1_config(tmp_path / "run", vae, steps=2)
    train(config, scenes)

    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"step": Malicious()}, config.output / CHECKPOINT)
    config.resume = True
    with pytest.raises(UserError, match="cannot be read"):
        Trainer(config, Stage1(config, scenes))
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, scenes, vae):
    config = stage1_config(tmp_path / "run", vae)
    trainer = Trainer(config, Stage1(config, scenes))
    before = files(config.output)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow beyond 1000 bytes
    try:
        with pytest.raises(
            UserError, match=r"checkpoint.pt could not be written: File too large.*continue with --resume"
        ):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(config.output) == before
    config.resume = True
    assert Trainer(config, Stage1(config, scenes)).step == 0


@on_devices
def test_losses_and_pictures_are_logged(tmp_path, scenes, vae):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"tensorboard": True, "pictures_every": 3, "report_every": 3, "save_every": 5, "gradient_accumulation": 2}
    config = stage1_config(tmp_path / "run", vae, **options)
    trainer = Trainer(config, Stage1(config, scenes))
    train_on, l1 = trainer.train_on, []

    def record(batch):
        losses = train_on(batch)
        l1.append(losses.terms["l1"].item())
        return losses

    trainer.train_on = record
    trainer.run()
    events = EventAccumulator(str(config.output))
    events.Reload()
    reported = events.Scalars("loss/l1")
    assert [event.step for event in reported] == [3, 5, 6]
    means = [np.mean(l1[first:last]) for first, last in ((0, 6), (6, 10), (10, 12))]
    assert [event.value for event in reported] == pytest.approx(means, rel=1e-5)
    tags = set(events.Tags()["scalars"])
    assert {"loss/correspondence", "loss/regularization", "loss/deviation", "gradient norm", "learning rate"} <= tags
    pictures = events.Images("views")
    assert [picture.step for picture in pictures] == [3, 6]
    # Two pairs of views and what is decoded, 2 px between.
    assert (pictures[0].width, pictures[0].height) == (4 * 34 + 2, 2 * 34 + 2)


def launch(processes: int, script: Path, *arguments: object) -> None:
    """Runs a script on several CPU processes, as users do."""
    # accelerate starts several processes with --multi_gpu alone; the script says that there are no GPUs.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes]
    command += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*map(str, command), str(script), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr


TWO_PROCESSES = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from shifted_views import shifted_views
from tiny_runs import stage1_config
from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.stage1 import Stage1

folder = Path({folder!r})
options = json.loads((folder / "options.json").read_text())
stop_at = options.pop("stop_at", None)
config = stage1_config(folder / options.pop("output"), **options)
trainer = Trainer(config, Stage1(config, [shifted_views(folder / ("views" + os.environ["RANK"]))]))
assert trainer.accelerator.num_processes == 2
train_on = trainer.train_on
trainer.train_on = lambda batch: os._exit(0) if trainer.step == stop_at else train_on(batch)
trainer.run()
"""


def test_two_processes_compute_what_one_does(tmp_path, vae):
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parents[1] / "helpers"), folder=str(tmp_path)))
    options = {"vae": vae, "gan_weight": 0.5, "gan_start": 100, "discriminator": "patch"} | ONLY_MEANS
    (tmp_path / "options.json").write_text(json.dumps(options | {"output": "two", "batch_size": 1}))
    launch(2, script)
    scenes = [shifted_views(tmp_path / "views")]
    train(stage1_config(tmp_path / "one", batch_size=2, **options), scenes)
    train(stage1_config(tmp_path / "half", batch_size=1, **options), scenes)
    untouched = stage1_config(tmp_path / "untouched", **options)
    Trainer(untouched, Stage1(untouched, scenes))

    assert_same_way(tmp_path / "two", tmp_path / "one", tmp_path / "untouched")
    with pytest.raises(AssertionError):
        assert_same_way(tmp_path / "half", tmp_path / "one", tmp_path / "untouched")


def test_two_processes_go_on_where_they_were(tmp_path, vae):
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parents[1] / "helpers"), folder=str(tmp_path)))
    options = {"vae": vae, "batch_size": 1, "save_every": 3}
    (tmp_path / "options.json").write_text(json.dumps(options | {"output": "whole"}))
    launch(2, script)
    (tmp_path / "options.json").write_text(json.dumps(options | {"output": "stopped", "stop_at": 4}))
    launch(2, script)
    assert state(tmp_path / "stopped")["step"] == 3
    (tmp_path / "options.json").write_text(json.dumps(options | {"output": "stopped", "resume": True}))
    launch(2, script)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
