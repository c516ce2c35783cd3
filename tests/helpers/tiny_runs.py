"""Runs of stage I that take a second: tiny autoencoders, small crops, shifted views."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from lrf_nerfstudio.training.checkpoint import CHECKPOINT
from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.stage1 import Stage1, Stage1Config

QUICK = {
    "crop": 32,
    "steps": 6,
    "batch_size": 2,
    "save_every": 2,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "workers": 0,
    "tensorboard": False,
    "device": "cpu",
}
"""Options of any stage for a run that takes a second, reads in the same process and logs nothing."""


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


def tiny_config(output: Path, vae: str, **options) -> Stage1Config:
    """A configuration that reads photographs in the same process and logs nothing."""
    return Stage1Config(output=output, vae=vae, **(QUICK | {"max_reduction": 1.5} | options))


def tune(config: Stage1Config, scenes) -> Trainer:
    """Runs a configuration to its end."""
    tuner = Trainer(config, Stage1(config, scenes))
    tuner.run()
    return tuner


def state(output: Path) -> dict:
    """The checkpoint of a run."""
    return torch.load(output / CHECKPOINT, weights_only=True)


def assert_same_state(actual: dict, expected: dict, **tolerance) -> None:
    """Two checkpoints are equal, bit for bit unless a tolerance is given."""
    assert actual.keys() == expected.keys()
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for part in ("network", "discriminator"):
        for name in expected.get(part, {}):
            torch.testing.assert_close(actual[part][name], expected[part][name], **tolerance)
    for one, other in zip(actual["ema"]["shadow_params"], expected["ema"]["shadow_params"], strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def photographs(folder: Path):
    pass
def pretrain_config():
    pass
