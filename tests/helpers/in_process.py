"""The plugin's parts without a command around them."""

import copy
from pathlib import Path
from typing import Any

from nerfstudio.engine.trainer import TrainerConfig

from lrf_nerfstudio.guidance import OrbitConfig
from lrf_nerfstudio.plugin.dream_trainer import DreamSplatTrainer
from lrf_nerfstudio.plugin.fitting import forget_writers
from lrf_nerfstudio.plugin.method import latent_dreamsplat, latent_splatfacto
from lrf_nerfstudio.plugin.pipeline import LatentPipeline
from lrf_nerfstudio.plugin.trainer import LatentTrainer


def make_config(scene: Path, vae: Path, output: Path, device: str = "cpu", **options: Any) -> TrainerConfig:
    """The method's configuration for a scene; `options` are those of the model or pipeline, their parts joined by `__`.

    Example: `make_config(scene, vae, output, sh_degree=0, datamanager__camera_res_scale_factor=0.5)`.
    """
    config = copy.deepcopy(latent_splatfacto.config)
    config.pipeline.datamanager.data = config.data = scene
    config.pipeline.vae.source = str(vae)
    _set(config, output, device, options)
    return config


def _set(config: TrainerConfig, output: Path, device: str, options: dict[str, Any]) -> None:
    forget_writers()  # of other tests' trainers: nerfstudio keeps them, and what they were to write
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


def make_dream_config(
    diffusion: Path, output: Path, prompt: str = "a red cube", device: str = "cpu", **options: Any
) -> TrainerConfig:
    """The configuration of text to 3D with a diffusion model whose autoencoder is in its folder."""
    config = copy.deepcopy(latent_dreamsplat.config)
    config.prompt = config.pipeline.model.prompt = prompt
    config.pipeline.diffusion.source, config.pipeline.vae.source = str(diffusion), str(diffusion / "vae")
    config.pipeline.model.initialization.count = 200
    config.pipeline.orbits = OrbitConfig(views=2, cells=16, eval_views=4)
    _set(config, output, device, options)
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
    return _trainer(make_config(scene, vae, output, **options), steps, load_from)


def make_dream_trainer(
    diffusion: Path, output: Path, steps: int, load_from: tuple[Path, int | None] | None = None, **options: Any
) -> DreamSplatTrainer:
    """The same of text to 3D."""
    return _trainer(make_dream_config(diffusion, output, **options), steps, load_from)


def _trainer(config: TrainerConfig, steps: int, load_from: tuple[Path, int | None] | None) -> Any:
    config.max_num_iterations = steps
    if load_from is not None:
        config.load_dir, config.load_step = load_from
    config.save_config()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    return trainer
