"""The options that all trainings share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from lrf_nerfstudio.utils.options import AtLeastOne, Count, NotNegative, Positive, Range

Momentum = Annotated[float, Range(least=0, below=1)]
"""Weight of the past in a moving average."""


@dataclass(kw_only=True)
class TrainingConfig:
    """The options of the loop, whatever is trained."""

    output: Path
    """Folder to write to: the trained autoencoder as a diffusers folder, the checkpoint, TensorBoard's events."""
    steps: AtLeastOne = 2000
    """Number of optimizer steps."""
    batch_size: AtLeastOne = 4
    """Samples that each process computes at once."""
    gradient_accumulation: AtLeastOne = 1
    """Batches whose gradients are averaged in one step."""
    learning_rate: Positive = 1e-4
    """Largest learning rate of Adam. Tiny autoencoders bear 1e-4; the KL autoencoder of Stable Diffusion was trained
    with 4.5e-6."""
    betas: tuple[Momentum, Momentum] = (0.5, 0.9)
    """Momenta of Adam; the default is that of latent diffusion's autoencoders."""
    warmup_steps: Count = 50
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """The learning rate after the warm-up: constant, or falling to 0 along a cosine."""
    max_gradient_norm: Positive = 1.0
    """Larger gradients are scaled down to this norm."""
    ema_decay: Momentum = 0.995
    """Decay of the moving average of the weights, which is what is written. It starts lower and rises to this value."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the computation; weights and losses stay float32. bf16 halves the time of a step on processors and
    GPUs that support it."""
    feature_weight: NotNegative = 0.0
    """Weight of the perceptual loss that compares features of --feature-network."""
    feature_network: str = "tf_efficientnet_lite0"
    """Network trained on ImageNet, by its name in timm or torchvision. Its features are compared by the feature loss
    and judged by the projected discriminator. Nothing is loaded where neither is used."""
    lpips_weight: NotNegative = 0.0
    """Weight of LPIPS (VGG)."""
    download_weights: bool = False
    """Download the weights of --feature-network (tf_efficientnet_lite0: 20 MB) and of LPIPS's VGG (530 MB) where
    PyTorch's cache lacks them. Without its weights, a perceptual loss is left out."""
    gan_weight: NotNegative = 0.0
    """Weight of the adversarial loss, relative to the gradient of the reconstruction loss; 0 leaves it out. Latent
    diffusion uses 0.5."""
    discriminator: Literal["projected", "patch"] = "projected"
    """The discriminator judges features of --feature-network (Projected GAN), which it learns in a hundred steps, or
    pixels (PatchGAN, as in latent diffusion), which takes tens of thousands of steps."""
    gan_start: Count = 50
    """First step at which the adversarial loss trains the decoder; the discriminator trains from step 0."""
    gan_learning_rate: Positive = 4e-4
    """Learning rate of the discriminator."""
    seed: Count = 0
    """Seed of the order of the data and of everything random; sample n is the same in every run."""
    workers: Count = 2
    """Processes that load data for each training process; 0 loads it in the training process."""
    report_every: AtLeastOne = 10
    """Steps between reports of the losses, which are means since the last report. A GPU waits at a report."""
    save_every: AtLeastOne = 100
    """Steps between checkpoints."""
    pictures_every: AtLeastOne = 100
    """Steps between TensorBoard's pictures."""
    tensorboard: bool = True
    """Write losses and pictures for TensorBoard, where the package tensorboard is installed."""
    resume: bool = False
    """Continue from the checkpoint in the output folder, with the data that would have come next."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` uses the GPU of each process where there is one."""

    free_options: ClassVar[frozenset[str]] = frozenset(
        {
            *("output", "resume", "device", "workers", "download_weights"),
            *("report_every", "save_every", "pictures_every", "tensorboard"),
        }
    )
    """Options that may differ between a run and its continuation: they do not change what is computed."""


@dataclass(kw_only=True)
class FineTuneConfig(TrainingConfig):
    """The options of the trainings that start from a trained autoencoder."""

    vae: str = "lrf-f4c4"
    """The autoencoder to tune: a name in the package's assets, a diffusers folder, a .ckpt or .safetensors file in
    latent-diffusion layout, or a Hugging Face id."""
