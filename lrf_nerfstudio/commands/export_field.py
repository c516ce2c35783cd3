"""Export a trained scene as one safetensors file that keeps all latent channels.

`LatentField.load` (lrf_nerfstudio/field/latent_field.py) reads the file; nerfstudio is not needed there.

Example: `lrf export --load-config outputs/fox/latent-splatfacto/run/config.yml --output-path field.safetensors`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class ExportField:
    """Export a scene that latent-splatfacto trained."""

    load_config: Path
    """The config.yml of the trained scene."""
    output_path: Path = Path("field.safetensors")
    """Where to write the field."""


@torch.no_grad()
def main(options: ExportField) -> None:
    """Write the file and say what is in it."""
    from nerfstudio.utils.eval_utils import eval_setup

    from lrf_nerfstudio.plugin.export import exported_field

    _, pipeline, _, _ = eval_setup(options.load_config, test_mode="inference")
    parsed = pipeline.datamanager.train_dataparser_outputs
    field = exported_field(pipeline.model, parsed.dataparser_transform, parsed.dataparser_scale)
    field.save(options.output_path)
    count, bases, channels = field.features.shape
    print(f"{options.output_path}: {count} Gaussians, {channels} channels, {bases} harmonics, VAE {field.vae_source}")
