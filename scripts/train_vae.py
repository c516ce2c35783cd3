"""Trains an autoencoder from scratch on folders of photographs; the result is a diffusers folder.

Example: `python scripts/train_vae.py --images photos/ --output vae/`, then
`ns-train latent-splatfacto --data scene --pipeline.vae.source vae/`.
"""

import sys
from contextlib import ExitStack

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lrf_nerfstudio.training.pretrain import TrainVAEConfig, VAETrainer
from lrf_nerfstudio.utils.errors import UserError


def train(config: TrainVAEConfig) -> None:
    """Runs the training with a progress bar, and TensorBoard if wished."""
    trainer = VAETrainer(config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, TimeRemainingColumn()))
        writer = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = stack.enter_context(SummaryWriter(str(config.output)))
        task = progress.add_task("training", total=config.steps, completed=trainer.step)

        def report(step: int, values: dict[str, float]) -> None:
            if "loss" in values:
                progress.update(task, completed=step, description=f"loss {values['loss']:.4f}")
            elif values:
                progress.print(f"step {step}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))
            if writer is not None:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)

        trainer.run(report)


def main() -> None:
    """Command line."""
    try:
        train(tyro.cli(TrainVAEConfig, description=__doc__))
    except UserError as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
