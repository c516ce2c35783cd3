"""Decode a trained scene with another VAE that has the same encoder.

Writes a copy of the scene's config.yml that names the VAE; ns-viewer, ns-render, ns-eval and ns-export take it as their
--load-config. The trained scene itself is neither copied nor changed.

Example: `lrf set-vae --load-config outputs/fox/latent-splatfacto/run/config.yml --vae taesd-stage3`, then
`ns-eval --load-config outputs/fox/latent-splatfacto/run/config-taesd-stage3.yml --output-path eval.json`.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import write_atomically
from lrf_nerfstudio.vae import VAEConfig


@dataclass
class SetVAE:
    """Writes a configuration of a trained scene that decodes with another VAE."""

    load_config: Path
    """The config.yml of the trained scene."""
    vae: str
    """The VAE to decode with, as --pipeline.vae.source of ns-train."""
    output_path: Path | None = None
    """Where to write the configuration; if none, config-<name of the VAE>.yml beside the one that is read."""


def set_vae(options: SetVAE) -> Path:
    """Writes the configuration; returns its path.

    Raises:
        UserError: the scene or the VAE cannot be read, or the scene was trained with another encoder.
    """
    from lrf_nerfstudio.plugin.trainer import LatentTrainerConfig, find_checkpoint, load_checkpoint

    try:
        # As nerfstudio reads it, which constructs any object: see the README on whose configurations to open.
        config = yaml.load(options.load_config.read_text(), Loader=yaml.Loader)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{options.load_config} (--load-config) cannot be read: {error}.") from error
    if not isinstance(config, LatentTrainerConfig):
        raise UserError(f"{options.load_config} (--load-config) is not of a scene that latent-splatfacto trained.")
    path = Path(options.vae).expanduser()
    source = str(path.resolve()) if path.exists() else options.vae
    checkpoint = load_checkpoint(find_checkpoint(config.get_checkpoint_dir()))
    trained_with = checkpoint["pipeline"]["_model._extra_state"]["vae"]
    if VAEConfig(source).setup().fingerprint != trained_with["fingerprint"]:
        raise UserError(
            f"The scene was trained in the latent space of {trained_with['source']!r}, and {options.vae!r} (--vae) has "
            "another encoder. Train the scene with it: ns-train latent-splatfacto --pipeline.vae.source ..."
        )
    config.pipeline.vae.source = source
    output = options.output_path or options.load_config.with_name(f"config-{Path(source).name}.yml")
    write_atomically(output, yaml.dump(config).encode(), "--output-path")
    return output


def main(options: SetVAE) -> None:
    """Write the configuration and say where it is."""
    Console().print(f"Wrote {set_vae(options)}", markup=False, soft_wrap=True)
