"""Autoencoders as the latent-diffusion code base and Stable Diffusion have them."""

import re

import torch


def ldm_layout(autoencoder):
    """The weights of an AutoencoderKL under the names that the latent-diffusion code base gives them."""
    levels = len(autoencoder.config.block_out_channels)
    names = [
        (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block.{m[2]}"),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"group_norm", "norm"),
        (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"),
    ]
    weights = {}
    for name, value in autoencoder.state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            value = value[..., None, None]  # 1 x 1 convolutions there, linear layers in diffusers
        weights[name] = value.contiguous()
    return weights


def stable_diffusion_autoencoder():
    """An AutoencoderKL of Stable Diffusion's configuration, with random weights: 84 million."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=256,
        )
