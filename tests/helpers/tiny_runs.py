"""Trainings that take a second: tiny autoencoders, small crops, shifted views."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from lrf_nerfstudio.training.checkpoint import CHECKPOINT
from lrf_nerfstudio.training.config import TrainingConfig
from lrf_nerfstudio.training.generic_decoder import GenericDecoder, GenericDecoderConfig
from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.pretrain import Pretrain, PretrainConfig
from lrf_nerfstudio.training.stage1 import Stage1, Stage1Config
from lrf_nerfstudio.training.stage3 import Stage3, Stage3Config
from lrf_nerfstudio.training.task import Task

QUICK = {
    "crop": 32,
    "steps": 6,
    "batch_size": 2,
    "save_every": 2,
    "report_every": 1,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "workers": 0,
    "tensorboard": False,
    "device": "cpu",
}
"""Options of any training for a run that takes a second, reads in the same process and logs nothing.

The fixture `device` of tests/training changes the device for the tests that use it.
"""


def write_tiny(folder: Path) -> str:
    """An AutoencoderTiny with 3 latent channels and factor 4, in its folder."""
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        latent_channels=3,
    ).save_pretrained(folder)
    return str(folder)


def write_kl(folder: Path) -> str:
    """An AutoencoderKL with 4 latent channels and factor 2, in its folder."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
    ).save_pretrained(folder)
    return str(folder)


def stage1_config(output: Path, vae: str, **options) -> Stage1Config:
    return Stage1Config(output=output, vae=vae, **(QUICK | {"max_reduction": 1.5} | options))


def stage3_config(output: Path, vae: str, pairs: Path, **options) -> Stage3Config:
    return Stage3Config(output=output, vae=vae, pairs=pairs, **(QUICK | {"margin": 1} | options))


def generic_config(output: Path, vae: str, pairs: Path, **options) -> GenericDecoderConfig:
    tiny = {"margin": 1, "width": 8, "blocks": 1}
    return GenericDecoderConfig(output=output, vae=vae, pairs=pairs, **(QUICK | tiny | options))


def pretrain_config(output: Path, images: Path, **options) -> PretrainConfig:
    tiny = {"width": 8, "encoder_blocks": (0, 0, 1), "decoder_blocks": (1, 1, 0)}
    return PretrainConfig(output=output, images=(images,), **(QUICK | tiny | options))


def train(config: TrainingConfig, scenes=None) -> Trainer:
    """Runs a configuration to its end; stage I needs scenes."""
    trainer = Trainer(config, make_task(config, scenes))
    trainer.run()
    return trainer


def make_task(config: TrainingConfig, scenes=None) -> Task:
    if isinstance(config, Stage1Config):
        return Stage1(config, scenes)
    if isinstance(config, GenericDecoderConfig):
        return GenericDecoder(config)
    return Stage3(config) if isinstance(config, Stage3Config) else Pretrain(config)


def batch_of(task: Task, size: int = 2) -> dict[str, Tensor]:
    """The first items of a task's data, stacked, on the CPU."""
    return torch.utils.data.default_collate([task.dataset[index] for index in range(size)])


def state(output: Path) -> dict:
    """The checkpoint of a run."""
    return torch.load(output / CHECKPOINT, weights_only=True, map_location="cpu")


def weights(output: Path) -> Tensor:
    """All weights of a run's network, moving average and discriminator as one vector."""
    parts = state(output)
    networks = [*parts["network"].values(), *parts["ema"]["shadow_params"], *parts.get("discriminator", {}).values()]
    return torch.cat([weight.flatten() for weight in networks])


def assert_same_end(actual: Path, expected: Path) -> None:
    """Two runs ended with the same weights: bit for bit on a CPU, where nothing is added up in random order."""
    one, other = weights(actual), weights(expected)
    assert state(actual)["step"] == state(expected)["step"]
    if QUICK["device"] == "cpu":
        assert torch.equal(one, other)
        for file in (*expected.glob("*.json"), *expected.glob("*.safetensors")):
            assert (actual / file.name).read_bytes() == file.read_bytes(), file.name
    else:
        assert (one - other).norm() < 1e-2 * other.norm()


def assert_resumes(make_config: Callable[..., TrainingConfig], folder: Path, scenes=None) -> None:
    """A run that is interrupted between two checkpoints and resumed ends as one that is not.

    Args:
        make_config: makes the configuration for an output folder.
        folder: to write to.
        scenes: of stage I.
    """
    whole = make_config(folder / "whole")
    train(whole, scenes)
    config = make_config(folder / "resumed")
    interrupted = Trainer(config, make_task(config, scenes))
    train_on, calls = interrupted.train_on, []

    def die(batch):
        calls.append(0)
        if len(calls) > 5:  # after the checkpoint of step 4, in the middle of the way to the next one
            raise KeyboardInterrupt
        return train_on(batch)

    interrupted.train_on = die
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert state(config.output)["step"] == 4 // config.gradient_accumulation
    config.resume = True
    train(config, scenes)
    assert_same_end(config.output, whole.output)


def assert_survives_kill(name: str, options: list[object], folder: Path, steps: int) -> tuple[Path, Path]:
    """A command that is killed with signal 9 and resumed ends as one that is not.

    Args:
        name: of the command of `lrf`.
        options: without --output, --steps and --save-every.
        folder: to write to.
        steps: of the run.

    Returns:
        The output folders of the whole run and of the killed one.
    """
    whole, killed = folder / "whole", folder / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums depend on the number of threads

    def command(output: Path, *more: str) -> list[str]:
        all_options = [*options, "--output", output, "--steps", steps, "--save-every", 1, "--device", "cpu", *more]
        return [sys.executable, "-m", "lrf_nerfstudio", name, *map(str, all_options)]

    subprocess.run(command(whole), check=True, capture_output=True, env=environment)
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 300
    while not ((killed / CHECKPOINT).exists() and state(killed)["step"] >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 3 <= state(killed)["step"] < steps
    subprocess.run(command(killed, "--resume"), check=True, capture_output=True, env=environment)
    assert_same_end(killed, whole)
    return whole, killed
