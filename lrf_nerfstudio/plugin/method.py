"""The methods that this package adds to nerfstudio.

nerfstudio imports this module at every command, so nothing heavy (diffusers, numba, gsplat kernels) is imported here.
"""

import copy

from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.plugins.types import MethodSpecification

from lrf_nerfstudio.plugin.datamanager import LatentDatamanagerConfig
from lrf_nerfstudio.plugin.dream_pipeline import DreamSplatPipelineConfig
from lrf_nerfstudio.plugin.dream_trainer import DreamSplatTrainerConfig
from lrf_nerfstudio.plugin.model import LatentSplatfactoModelConfig
from lrf_nerfstudio.plugin.optimizers import FusedAdamConfig, RunScheduleConfig
from lrf_nerfstudio.plugin.pipeline import LatentPipelineConfig
from lrf_nerfstudio.plugin.trainer import LatentTrainerConfig
from lrf_nerfstudio.vae import VAEConfig

latent_splatfacto = MethodSpecification(
    config=LatentTrainerConfig(
        method_name="latent-splatfacto",
        max_num_iterations=4000,
        steps_per_save=1000,
        steps_per_eval_batch=0,
        steps_per_eval_image=1000,
        steps_per_eval_all_images=0,
        pipeline=LatentPipelineConfig(
            datamanager=LatentDatamanagerConfig(
                dataparser=NerfstudioDataParserConfig(load_3D_points=True, eval_mode="interval")
            ),
            model=LatentSplatfactoModelConfig(camera_optimizer=CameraOptimizerConfig(mode="off")),
        ),
        optimizers={
            "means": {"optimizer": FusedAdamConfig(lr=1.6e-4), "scheduler": RunScheduleConfig(lr_final=1.6e-6)},
            "features_dc": {"optimizer": FusedAdamConfig(lr=1e-2), "scheduler": RunScheduleConfig()},
            "features_rest": {"optimizer": FusedAdamConfig(lr=5e-4), "scheduler": RunScheduleConfig()},
            "opacities": {"optimizer": FusedAdamConfig(lr=5e-2), "scheduler": RunScheduleConfig()},
            "scales": {"optimizer": FusedAdamConfig(lr=5e-3), "scheduler": RunScheduleConfig()},
            "quats": {"optimizer": FusedAdamConfig(lr=1e-3), "scheduler": RunScheduleConfig()},
            "camera_opt": {"optimizer": FusedAdamConfig(lr=1e-4), "scheduler": RunScheduleConfig(lr_final=5e-7)},
            "scene_decoder": {
                "optimizer": FusedAdamConfig(lr=4e-3, eps=1e-8),
                "scheduler": RunScheduleConfig(on_photographs=1.0, rise_on_photographs=0.05),
            },
        },
        # The viewer listens on this machine alone; --viewer.websocket-host 0.0.0.0 opens it to the network.
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15, websocket_host="127.0.0.1"),
        vis="viewer",
    ),
    description="Latent radiance field: Gaussian splatting in the latent space of a VAE, on a GPU or a CPU.",
)


def _with_stable_diffusion() -> MethodSpecification:
    """The same method in the latent space of Stable Diffusion 1 and 2.

    Its autoencoder has 84 million parameters. In half precision, one tile of one photograph after the other, its
    memory is bounded, whatever the size of the photographs.
    """
    config = copy.deepcopy(latent_splatfacto.config)
    config.method_name = "latent-splatfacto-sd"
    assert isinstance(config.pipeline, LatentPipelineConfig)
    config.pipeline.vae = VAEConfig(
        source="stabilityai/sd-vae-ft-mse", dtype="float16", tiling=True, tile_size=768, slicing=True
    )
    return MethodSpecification(
        config, description="Latent radiance field in the latent space of Stable Diffusion; for GPUs."
    )


latent_splatfacto_sd = _with_stable_diffusion()

latent_dreamsplat = MethodSpecification(
    config=DreamSplatTrainerConfig(
        method_name="latent-dreamsplat",
        max_num_iterations=5000,
        steps_per_save=1000,
        steps_per_eval_batch=0,
        steps_per_eval_image=250,
        steps_per_eval_all_images=0,
        pipeline=DreamSplatPipelineConfig(),
        optimizers={
            "means": {"optimizer": FusedAdamConfig(lr=2e-3), "scheduler": RunScheduleConfig(lr_final=1e-4)},
            "features_dc": {"optimizer": FusedAdamConfig(lr=1e-2), "scheduler": RunScheduleConfig(lr_final=5e-3)},
            "features_rest": {"optimizer": FusedAdamConfig(lr=5e-4), "scheduler": RunScheduleConfig()},
            "opacities": {"optimizer": FusedAdamConfig(lr=2e-2), "scheduler": RunScheduleConfig()},
            "scales": {"optimizer": FusedAdamConfig(lr=5e-3), "scheduler": RunScheduleConfig(lr_final=1e-3)},
            "quats": {"optimizer": FusedAdamConfig(lr=1e-3), "scheduler": RunScheduleConfig()},
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15, websocket_host="127.0.0.1"),
        vis="viewer+tensorboard",
    ),
    description="Text to 3D: Gaussians in a latent space, guided by a latent diffusion model such as Stable Diffusion.",
)
