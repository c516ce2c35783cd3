"""Train a generic decoder, from which the decoders of new scenes start, on what the fields of many scenes render.

The result is `scene_decoder.safetensors` in the output folder: `--pipeline.model.scene-decoder.start FILE` of ns-train
starts from it, and where it lies in the folder of its VAE, `generic` does. On several processes or machines:
`accelerate launch scripts/train_generic_decoder.py ...`.

Example: `lrf pairs --scenes plush banana --density 2 --steps 1500 --output pairs`, then
`lrf generic-decoder --pairs pairs --output generic`.
"""

from lrf_nerfstudio.training.generic_decoder import GenericDecoder, GenericDecoderConfig
from lrf_nerfstudio.training.loop import Trainer


def main(config: GenericDecoderConfig) -> None:
    """Train a generic decoder."""
    Trainer(config, GenericDecoder(config)).run()
