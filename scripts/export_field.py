"""Export a trained scene as one safetensors file that keeps all latent channels; `LatentField.load` reads it again."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from lrf_nerfstudio.utils.errors import exit_on_user_error


@dataclass
class ExportField:
    """Export a scene that latent-splatfacto trained."""

    load_config: Path
    """The config.yml of the trained scene."""
    output_path: Path = Path("field.safetensors")
    """Where to write the field."""

    @exit_on_user_error()
    def main(self) -> None:
        """Write the file and say what is in it."""
        from nerfstudio.utils.eval_utils import eval_setup

        _, pipeline, _, _ = eval_setup(self.load_config, test_mode="inference")
        parsed = pipeline.datamanager.train_dataparser_outputs
        field = pipeline.model.to_field(parsed.dataparser_transform, parsed.dataparser_scale)
        field.save(self.output_path)
        count, bases, channels = field.features.shape
        print(f"{self.output_path}: {count} Gaussians, {channels} channels, {bases} harmonics, VAE {field.vae_source}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    tyro.cli(ExportField).main()
