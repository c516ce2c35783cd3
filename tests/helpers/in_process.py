"""The plugin's parts without a command around them."""

import copy
from pathlib import Path
from typing import Any

from nerfstudio.engine.trainer import TrainerConfig

from lrf_nerfstudio.plugin.method import latent_splatfacto
from lrf_nerfstudio.plugin.pipeline import LatentPipeline
from lrf_nerfstudio.plugin.trainer import LatentTrainer


def make_config(scene: Path, vae: Path, output: Path, device: str = "cpu", **options: Any) -> TrainerConfig:
    """The method's configuration for a scene; `options` are those of the model or pipeline, their parts joined by `__`.

    Example: `make_config(scene, vae, output, sh_degree=0, datamanager__camera_res_scale_factor=0.5)`.
    """
    config = copy.deepcopy(latent_splatfacto.config)
    config.pipeline.datamanager.data = config.data = scene
    config.pipeline.vae.source = str(vae)
    config.output_dir, config.timestamp, config.vis = output, "run", "tensorboard"
    config.machine.device_type = device
    for name, value in options.items():
        *owners, attribute = name.split("__")
        model, target = config.pipeline.model, config.pipeline
        if hasattr(model, owners[0] if owners else attribute):
            target = model
        for part in owners:
            target = getattr(target, part)
        assert hasattr(target, attribute), name
        setattr(target, attribute, value)
    return config


def make_pipeline(
    scene: Path, vae: Path, test_mode: str = "val", device: str = "cpu", **options: Any
) -> LatentPipeline:
    """A pipeline as ns-train (`val`) or as ns-eval (`test`) makes it."""
    return make_config(scene, vae, Path(), device, **options).pipeline.setup(device=device, test_mode=test_mode)


def make_trainer(
    scene: Path, vae: Path, output: Path, steps: int, load_from: tuple[Path, int | None] | None = None, **options: Any
) -> LatentTrainer:
    """A trainer that is ready to train for a number of steps, from a checkpoint folder and step if given."""
    config = make_config(scene, vae, output, **options)
    config.max_num_iterations = steps
    if load_from is not None:
        config.load_dir, config.load_step = load_from
    config.save_config()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer
