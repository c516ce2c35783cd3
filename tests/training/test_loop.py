import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from shifted_views import shifted_views
from tiny_runs import assert_same_state, state, tiny_config, tune, write_kl, write_tiny

from lrf_nerfstudio.training.loop import CHECKPOINT, FineTuner
from lrf_nerfstudio.training.stage1 import Stage1
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAEConfig


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return [shifted_views(tmp_path_factory.mktemp("views"))]


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    return write_tiny(tmp_path_factory.mktemp("vae"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gan_weight": 0.5, "gan_start": 3, "feature_weight": 0.1},
        {"gan_weight": 0.5, "gan_start": 3, "discriminator": "patch", "tune": "decoder"},
        {"gradient_accumulation": 2},
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, scenes, vae, options):
    whole = tiny_config(tmp_path / "whole", vae, **options)
    tune(whole, scenes)

    config = tiny_config(tmp_path / "resumed", vae, **options)
    interrupted = FineTuner(config, Stage1(config, scenes))
    steps = 0

    def die(*arguments):
        nonlocal steps
        steps += 1
        if steps > 5:  # after the checkpoint of step 4, in the middle of the way to the next one
            raise KeyboardInterrupt
        return train_on(*arguments)

    train_on, interrupted.train_on = interrupted.train_on, die
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert state(config.output)["step"] == (2 if "gradient_accumulation" in options else 4)
    config.resume = True
    tune(config, scenes)
    assert_same_state(state(config.output), state(whole.output))
    assert (config.output / "config.json").read_bytes() == (whole.output / "config.json").read_bytes()


def test_posterior_noise_is_the_same_after_a_resume(tmp_path, scenes):
    vae = write_kl(tmp_path / "vae")
    whole, config = (tiny_config(tmp_path / name, vae, steps=4, save_every=2) for name in ("whole", "resumed"))
    tune(whole, scenes)
    config.steps = 4
    tuner = FineTuner(config, Stage1(config, scenes))
    train_on, calls = tuner.train_on, []
    tuner.train_on = lambda batch: train_on(batch) if len(calls) < 3 and not calls.append(0) else sys.exit()
    with pytest.raises(SystemExit):
        tuner.run()
    config.resume = True
    tune(config, scenes)
    assert_same_state(state(config.output), state(whole.output))


ONLY_MEANS = {f"{term}_weight": 0.0 for term in ("correspondence", "deviation", "regularization")}
"""Leaves a loss that is a mean over samples. The latents' deviation is that of what a process computes at once."""


def weights(output: Path) -> torch.Tensor:
    """All weights of a run's network and discriminator as one vector."""
    parts = state(output)
    networks = (parts.get(part, {}) for part in ("network", "discriminator"))
    return torch.cat([weight.flatten() for network in networks for weight in network.values()])


def assert_same_way(actual: Path, expected: Path, untouched: Path) -> None:
    """Two runs went the same way; Adam makes much of gradients that are zero but for rounding, so not to the bit."""
    way = (weights(expected) - weights(untouched)).norm()
    assert (weights(actual) - weights(expected)).norm() < 0.03 * way


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path, scenes, vae):
    tune(tiny_config(tmp_path / "large", vae, batch_size=4, **ONLY_MEANS), scenes)
    tune(tiny_config(tmp_path / "small", vae, batch_size=1, gradient_accumulation=4, **ONLY_MEANS), scenes)
    untouched = tiny_config(tmp_path / "untouched", vae)
    FineTuner(untouched, Stage1(untouched, scenes))
    assert_same_way(tmp_path / "small", tmp_path / "large", tmp_path / "untouched")


def test_the_moving_average_is_what_is_written(tmp_path, scenes, vae):
    config = tiny_config(tmp_path / "run", vae, ema_decay=0.5)
    tuner = tune(config, scenes)
    written = VAEConfig(str(config.output)).setup().autoencoder
    for average, parameter in zip(tuner.ema.shadow_params, written.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), average, rtol=0, atol=0)
    differences = [
        (average - parameter).abs().max().item()
        for average, parameter in zip(tuner.ema.shadow_params, tuner.task.network.parameters(), strict=True)
    ]
    assert max(differences) > 1e-6


def test_learning_rates_rise_and_fall(tmp_path, scenes, vae):
    config = tiny_config(tmp_path / "run", vae, steps=8, warmup_steps=2, learning_rate=1e-3)
    tuner = FineTuner(config, Stage1(config, scenes))
    rates = []
    train_on = tuner.train_on
    tuner.train_on = lambda batch: (rates.append(tuner.scheduler.get_last_lr()[0]), train_on(batch))[1]
    tuner.run()
    assert rates[:3] == [0.0, 5e-4, 1e-3]
    assert rates[5] == pytest.approx(5e-4) and rates[7] == pytest.approx(6.7e-5, rel=0.01)


def test_gradients_are_clipped(tmp_path, scenes, vae):
    config = tiny_config(tmp_path / "run", vae, max_gradient_norm=1e-3, steps=1)
    tuner = FineTuner(config, Stage1(config, scenes))
    norms = []

    def record(optimizer, *arguments):
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    tuner.optimizer.optimizer.register_step_pre_hook(record)
    tuner.run()
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights(tmp_path, scenes, vae):
    plain = tune(tiny_config(tmp_path / "float32", vae), scenes)
    AcceleratorState._reset_state()  # which would else keep the precision of the first run
    mixed = tune(tiny_config(tmp_path / "bfloat16", vae, mixed_precision="bf16"), scenes)
    weights = [torch.cat([p.detach().flatten() for p in tuner.task.network.parameters()]) for tuner in (plain, mixed)]
    assert weights[1].dtype == torch.float32
    assert not torch.equal(*weights)
    torch.testing.assert_close(*weights, atol=0.02, rtol=0.05)
    AcceleratorState._reset_state()
    config = tiny_config(tmp_path / "float16", vae, mixed_precision="fp16")
    with pytest.raises(UserError, match="fp16"):
        FineTuner(config, Stage1(config, scenes))


def test_the_decoder_hears_the_discriminator_from_its_start_step_on(tmp_path, scenes, vae):
    tune(tiny_config(tmp_path / "without", vae, steps=4), scenes)
    tune(tiny_config(tmp_path / "late", vae, steps=4, gan_weight=0.5, gan_start=4), scenes)
    tune(tiny_config(tmp_path / "early", vae, steps=4, gan_weight=0.5, gan_start=2), scenes)
    without, late, early = (state(tmp_path / name) for name in ("without", "late", "early"))
    for name, weight in without["network"].items():
        torch.testing.assert_close(late["network"][name], weight, rtol=0, atol=0)
    assert any(not torch.equal(early["network"][name], weight) for name, weight in without["network"].items())
    first = tiny_config(tmp_path / "first", vae, gan_weight=0.5)
    before = FineTuner(first, Stage1(first, scenes))._plain_discriminator.state_dict()
    assert any(not torch.equal(late["discriminator"][name], weight) for name, weight in before.items())


@pytest.mark.parametrize("term", ["l1", "correspondence"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, scenes, vae, term, monkeypatch):
    config = tiny_config(tmp_path / "run", vae)
    task = Stage1(config, scenes)
    tuner = FineTuner(config, task)
    losses, calls = task.losses, []

    def poisoned(network, batch):
        result = losses(network, batch)
        calls.append(0)
        if len(calls) == 4:
            result.terms[term] = result.terms[term] * float("nan")
        return result

    monkeypatch.setattr(task, "losses", poisoned)
    with pytest.raises(UserError, match=rf"Step 3: {term} is not finite.*checkpoint.*kept"):
        tuner.run()
    kept = state(config.output)
    assert kept["step"] == 2
    assert all(torch.isfinite(weight).all() for weight in kept["network"].values())


def test_another_run_in_the_output_folder_is_left_alone(tmp_path, scenes, vae):
    config = tiny_config(tmp_path / "run", vae, steps=2)
    tune(config, scenes)
    before = files(config.output)
    with pytest.raises(UserError, match="holds a run already"):
        FineTuner(config, Stage1(config, scenes))
    for name, value in {"learning_rate": 5e-4, "crop": 16, "correspondence_weight": 0.7, "batch_size": 1}.items():
        other = tiny_config(config.output, vae, steps=2, resume=True, **{name: value})
        with pytest.raises(UserError, match=f"of another run: its {name} is"):
            FineTuner(other, Stage1(other, scenes))
    retrained = VAEConfig(vae).setup()
    retrained.autoencoder.encoder.layers[0].bias += 1.0
    retrained.save(tmp_path / "other vae")
    os.rename(tmp_path / "other vae", moved := tmp_path / "moved")
    other = tiny_config(config.output, str(moved), steps=2, resume=True)
    with pytest.raises(UserError, match="of another run: its vae is"):
        FineTuner(other, Stage1(other, scenes))
    assert files(config.output) == before


def test_a_folder_with_other_things_is_not_written_to(tmp_path, scenes, vae):
    before = files(Path(vae))
    config = tiny_config(Path(vae), vae)
    with pytest.raises(UserError, match="is not empty"):
        FineTuner(config, Stage1(config, scenes))
    assert files(Path(vae)) == before
    config = tiny_config(tmp_path / "nothing", vae, resume=True)
    with pytest.raises(UserError, match="no run to --resume"):
        FineTuner(config, Stage1(config, scenes))
    assert not config.output.exists()


def test_a_malicious_checkpoint_is_not_run(tmp_path, scenes, vae):
    config = tiny_config(tmp_path / "run", vae, steps=2)
    tune(config, scenes)

    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"step": Malicious()}, config.output / CHECKPOINT)
    config.resume = True
    with pytest.raises(UserError, match="cannot be read"):
        FineTuner(config, Stage1(config, scenes))
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, scenes, vae):
    config = tiny_config(tmp_path / "run", vae)
    tuner = FineTuner(config, Stage1(config, scenes))
    before = files(config.output)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow beyond 1000 bytes
    try:
        with pytest.raises(UserError, match=r"step 2 could not be written.*make room and go on with --resume"):
            tuner.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(config.output) == before
    config.resume = True
    assert FineTuner(config, Stage1(config, scenes)).step == 0


def test_losses_and_pictures_are_logged(tmp_path, scenes, vae):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tmp_path / "run", vae, tensorboard=True, pictures_every=3)
    tune(config, scenes)
    events = EventAccumulator(str(config.output))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/correspondence")] == [1, 2, 3, 4, 5, 6]
    assert {"loss/l1", "loss/regularization", "loss/deviation", "learning rate"} <= set(events.Tags()["scalars"])
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
from tiny_runs import tiny_config
from lrf_nerfstudio.training.loop import FineTuner
from lrf_nerfstudio.training.stage1 import Stage1

folder = Path({folder!r})
options = json.loads((folder / "options.json").read_text())
stop_at = options.pop("stop_at", None)
config = tiny_config(folder / options.pop("output"), **options)
tuner = FineTuner(config, Stage1(config, [shifted_views(folder / ("views" + os.environ["RANK"]))]))
assert tuner.accelerator.num_processes == 2
train_on = tuner.train_on
tuner.train_on = lambda batch: os._exit(0) if tuner.step == stop_at else train_on(batch)
tuner.run()
"""


def test_two_processes_compute_what_one_does(tmp_path, vae):
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parents[1] / "helpers"), folder=str(tmp_path)))
    options = {"vae": vae, "gan_weight": 0.5, "gan_start": 100} | ONLY_MEANS
    (tmp_path / "options.json").write_text(json.dumps(options | {"output": "two", "batch_size": 1}))
    launch(2, script)
    scenes = [shifted_views(tmp_path / "views")]
    tune(tiny_config(tmp_path / "one", batch_size=2, **options), scenes)
    tune(tiny_config(tmp_path / "half", batch_size=1, **options), scenes)
    untouched = tiny_config(tmp_path / "untouched", **options)
    FineTuner(untouched, Stage1(untouched, scenes))

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
    assert_same_state(state(tmp_path / "stopped"), state(tmp_path / "whole"))
