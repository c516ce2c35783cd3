"""Stage III: tunes an autoencoder's decoder on latents that radiance fields rendered; its encoder stays as it is.

The result is a diffusers folder whose latents are those of the autoencoder that was tuned: cached latents stay valid,
and `python scripts/set_vae.py` lets scenes that are trained already decode with it. On several processes or machines:
`accelerate launch scripts/finetune_stage3.py ...`.

Example: `python scripts/build_stage3_pairs.py --scenes plush kitchen --vae taesd-stage1 --output pairs`, then
`python scripts/finetune_stage3.py --pairs pairs --vae taesd-stage1 --output taesd-stage3`.
"""

from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.stage3 import Stage3, Stage3Config
from lrf_nerfstudio.utils.cli import run


def main(config: Stage3Config) -> None:
    """Tune a decoder."""
    Trainer(config, Stage3(config)).run()


if __name__ == "__main__":
    run(main)
