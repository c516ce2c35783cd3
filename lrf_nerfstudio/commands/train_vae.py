"""Train an autoencoder from scratch on folders of photographs; the result is a diffusers folder.

On several processes or machines: `accelerate launch -m lrf_nerfstudio pretrain ...`.

Example: `lrf pretrain --images photos --output vae`, then
`ns-train latent-splatfacto --data scene --pipeline.vae.source vae`.
"""

from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.pretrain import Pretrain, PretrainConfig


def main(config: PretrainConfig) -> None:
    """Train an autoencoder."""
    Trainer(config, Pretrain(config)).run()
