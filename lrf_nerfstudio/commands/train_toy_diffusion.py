"""Train a small diffusion model of ten ray-traced objects in the latent space of a VAE.

It stands in for Stable Diffusion where that cannot be had, and knows "a red cube", "a green cube", "a blue ball",
"a yellow ball", "an orange cylinder", "a purple cylinder", "a cyan ring", "a pink ring", "a white vase" and
"a black vase". Less than an hour on two cores.

Example: `lrf toy-diffusion --vae lrf-f4c4 --output toy`, then `ns-train latent-dreamsplat
--prompt "a red cube" --pipeline.diffusion.source toy --pipeline.vae.source lrf-f4c4`.
"""

import io

import numpy as np
from torch import Tensor

from lrf_nerfstudio.guidance.models import DiffusionConfig
from lrf_nerfstudio.guidance.toy_diffusion import ToyDiffusionConfig, ToyTrainer, draw_samples
from lrf_nerfstudio.utils.files import write_atomically
from lrf_nerfstudio.utils.progress import progress_bar

REPORT_EVERY = 10  # steps; a GPU waits at a report


def main(config: ToyDiffusionConfig) -> None:
    """Train, and draw samples."""
    trainer = ToyTrainer(config)
    with progress_bar() as progress:
        task = progress.add_task("Training", total=config.steps, completed=trainer.step)

        def report(step: int, loss: Tensor) -> None:
            progress.update(task, completed=step)
            if step % REPORT_EVERY == 0:
                progress.update(task, status=f"loss {loss.item():.4f}")

        trainer.run(report)
    model = DiffusionConfig(source=str(config.output)).setup()
    _write_picture(config, draw_samples(model, trainer.vae, trainer.names, config.orbits.cells))
    print(f"The model is in {config.output}; samples.png there shows {', '.join(trainer.names)}.")


def _write_picture(config: ToyDiffusionConfig, images: Tensor) -> None:
    """Write pictures [N, H, W, 3] in rows of five."""
    from PIL import Image

    rows = [np.concatenate(list(row), axis=1) for row in np.split(images.cpu().numpy(), len(images) // 5)]
    stream = io.BytesIO()
    Image.fromarray(np.round(255 * np.concatenate(rows)).astype(np.uint8)).save(stream, "PNG")
    write_atomically(config.output / "samples.png", stream.getvalue(), "--output")
