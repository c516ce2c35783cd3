"""Stage I: tune an autoencoder so that corresponding points of different views have the same latent.

The result is a diffusers folder. On several processes or machines: `accelerate launch -m lrf_nerfstudio stage1 ...`.

Example: `lrf stage1 --scenes plush kitchen --vae madebyollin/taesd --output taesd-stage1`, then
`ns-train latent-splatfacto --data scene --pipeline.vae.source taesd-stage1`.
"""

from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.stage1 import Stage1, Stage1Config, load_scenes


def main(config: Stage1Config) -> None:
    """Tune an autoencoder."""
    Trainer(config, Stage1(config, load_scenes(config))).run()
