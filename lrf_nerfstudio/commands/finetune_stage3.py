"""Stage III: tune an autoencoder's decoder on latents that radiance fields rendered.

The result is a diffusers folder whose latents are those of the autoencoder that was tuned: cached latents stay valid,
and `lrf set-vae` lets scenes that are trained already decode with it. On several processes or machines:
`accelerate launch -m lrf_nerfstudio stage3 ...`.

Example: `lrf pairs --scenes plush kitchen --vae taesd-stage1 --output pairs`, then
`lrf stage3 --pairs pairs --vae taesd-stage1 --output taesd-stage3`.
"""

from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.stage3 import Stage3, Stage3Config


def main(config: Stage3Config) -> None:
    """Tune a decoder."""
    Trainer(config, Stage3(config)).run()
