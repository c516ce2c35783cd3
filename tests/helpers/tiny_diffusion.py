"""Diffusion models in diffusers' format with random weights: the layout of Stable Diffusion, but small."""

import json
from pathlib import Path

import torch

STABLE_DIFFUSION_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""unet/config.json of Stable Diffusion 1.5; version 2.1 differs in the attention."""
STABLE_DIFFUSION_2 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
TINY = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 16}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
"""scheduler/scheduler_config.json of Stable Diffusion 1.5."""


def make_unet(**options):
    """A tiny U-Net with random weights in the layout of Stable Diffusion 1.5."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**{**STABLE_DIFFUSION_UNET, **TINY, **options})


def make_diffusion(folder: Path, prediction_type: str | None = None, **unet_options) -> Path:
    """Write a tiny diffusion model."""
    from transformers import CLIPTokenizer

    from lrf_nerfstudio.guidance.toy_diffusion import make_text_encoder, write_tokenizer

    unet = make_unet(**unet_options)
    unet.save_pretrained(folder / "unet")
    write_tokenizer(folder / "tokenizer", ["a red cube, front view", "a blue ball, back view"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        make_text_encoder(unet.config.cross_attention_dim, tokenizer).save_pretrained(folder / "text_encoder")
    scheduler = SCHEDULER | ({"prediction_type": prediction_type} if prediction_type else {})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder
