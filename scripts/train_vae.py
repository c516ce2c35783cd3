"""Trains an autoencoder from scratch on folders of photographs; the result is a diffusers folder.

On several processes or machines: `accelerate launch scripts/train_vae.py ...`.

Example: `python scripts/train_vae.py --images photos --output vae`, then
`ns-train latent-splatfacto --data scene --pipeline.vae.source vae`.
"""

from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.pretrain import Pretrain, PretrainConfig
from lrf_nerfstudio.utils.cli import run


def main(config: PretrainConfig) -> None:
    """Train an autoencoder."""
    Trainer(config, Pretrain(config)).run()


if __name__ == "__main__":
    run(main)
