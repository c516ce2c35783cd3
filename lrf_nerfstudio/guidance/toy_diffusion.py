"""A small latent diffusion model of ten ray-traced objects, in the formats of diffusers and transformers.

What it learns is no more than ten objects by color and shape, from all sides. It is there to try text-to-3D where
Stable Diffusion's weights are not, in any latent space.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrf_nerfstudio.guidance.denoiser import PredictionType
from lrf_nerfstudio.guidance.distillation import ddim_step
from lrf_nerfstudio.guidance.models import DiffusionModel
from lrf_nerfstudio.guidance.orbits import OrbitConfig
from lrf_nerfstudio.guidance.prompts import TextEmbedder
from lrf_nerfstudio.utils.cache import TensorCache
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import make_folder, read_tensors, unwritable, write_atomically, write_tensors
from lrf_nerfstudio.utils.options import AtLeastOne, Count, Fraction, Positive, Range
from lrf_nerfstudio.utils.pretrained import quiet
from lrf_nerfstudio.utils.progress import track
from lrf_nerfstudio.vae import VAE, VAEConfig

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

CHECKPOINT, OPTIONS = "checkpoint.safetensors", "options.json"
START, END = "<|startoftext|>", "<|endoftext|>"
PROMPT_TOKENS = 24
"""Longest prompt, with the tokens that begin and end it."""
_DATA_FORMAT = 1  # raise it when the pictures change


@dataclass(kw_only=True)
class ToyDiffusionConfig:
    """Trains a small diffusion model on the latents of ray-traced objects."""

    output: Path
    """Folder to write to: the model in diffusers' format (unet/, scheduler/, text_encoder/, tokenizer/, vae/), the
    checkpoint, the latents, and a picture of samples."""
    vae: str
    """The autoencoder in whose latent space the model works: a source as for --pipeline.vae.source."""
    steps: AtLeastOne = 1500
    """Number of optimizer steps."""
    batch_size: AtLeastOne = 8
    """Latents per step."""
    learning_rate: Positive = 8e-4
    """Largest learning rate of Adam; it rises over at most 100 steps and falls along a cosine."""
    ema_decay: Annotated[float, Range(least=0, below=1)] = 0.995
    """Decay of the moving average of the weights, which is what is written."""
    channels: tuple[AtLeastOne, ...] = (48, 80, 128)
    """Channels of the U-Net at each resolution, the full one first; multiples of 16."""
    embedding_size: AtLeastOne = 64
    """Size of a token's embedding."""
    prediction_type: PredictionType = "epsilon"
    """What the U-Net predicts: the noise, or v as Stable Diffusion 2.1 does."""
    no_caption: Fraction = 0.1
    """Share of the latents that are shown without a caption, for classifier-free guidance."""
    no_view: Fraction = 0.3
    """Share of the captions that do not say from where the object is seen."""
    views: AtLeastOne = 120
    """Pictures of each of the ten objects."""
    orbits: OrbitConfig = field(
        default_factory=lambda: OrbitConfig(
            cells=32, fov=(45.0, 55.0), distance=(1.7, 2.0), position_jitter=0.05, target_jitter=0.03, roll_jitter=0.0
        )
    )
    """Where the cameras are, and how many cells a picture has. Text-to-3D with this model needs the same."""
    seed: Count = 0
    """Seed of the weights and of what each step draws."""
    save_every: AtLeastOne = 250
    """Steps between checkpoints."""
    resume: bool = False
    """Continue from the checkpoint in the output folder."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Device to train on."""

    free_options: ClassVar[frozenset[str]] = frozenset({"output", "save_every", "resume", "device"})
    """Options that may differ between a run and its continuation."""


class Examples(NamedTuple):
    """What the model learns."""

    latents: Tensor
    """[N, C, h, w], scaled latents."""
    tokens: Tensor
    """[N, 3, L], tokens of each picture's caption, of its caption without the view, and of the empty caption."""


class ToyTrainer:
    """The state of a run: networks, their moving average, optimizer, step."""

    def __init__(self, config: ToyDiffusionConfig) -> None:
        """Start a run, or take up the one in the output folder.

        Raises:
            UserError: if there is nothing to resume, another run is in the folder, transformers is missing, the VAE
                cannot be loaded, or the folder cannot be written to.
        """
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.config = config
        _check_output(config)
        self.vae = VAEConfig(source=config.vae).setup(config.device)
        views = load_views(config, self.vae)
        self.names = sorted(set(views.names))
        texts = sorted({*views.names, *views.captions, ""})
        write_tokenizer(config.output / "tokenizer", texts)
        self.tokenizer = _load_tokenizer(config.output / "tokenizer")
        tokens = {text: self._tokens(text) for text in texts}
        variants = [
            torch.stack([tokens[caption], tokens[name], tokens[""]])
            for caption, name in zip(views.captions, views.names, strict=True)
        ]
        self.examples = Examples(views.latents.to(config.device), torch.stack(variants).to(config.device))

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.unet = make_unet(config, self.vae.latent_channels)
            self.text_encoder = make_text_encoder(config.embedding_size, self.tokenizer)
        self.networks = nn.ModuleList([self.unet, self.text_encoder]).to(config.device)
        self.scheduler = DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=config.prediction_type,
            clip_sample=False,
        )
        self._alphas = self.scheduler.alphas_cumprod.to(config.device)
        self.parameters = list(self.networks.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=0.01)
        self.ema: EMAModel = EMAModel(self.parameters, decay=config.ema_decay)
        self.step = 0
        if config.resume:
            self._load()
        self.save()  # a folder that cannot be written shows now

    def run(self, report: Callable[[int, Tensor], None] = lambda step, loss: None) -> None:
        """Train to the end and save.

        Args:
            report: called after each step with its number and the loss, a scalar on the device.

        Raises:
            UserError: if the loss is not finite, or the disk is full.
        """
        self.networks.train()
        while self.step < self.config.steps:
            loss = self.train_step()
            self.step += 1
            report(self.step, loss)
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                if not math.isfinite(loss.item()):
                    raise UserError(f"Step {self.step}: the loss is not finite. Lower --learning-rate.")
                self.save()

    def train_step(self) -> Tensor:
        """Take a step, whose randomness depends on the seed and the step's number alone; return the loss."""
        config, examples = self.config, self.examples
        generator = torch.Generator().manual_seed((config.seed << 32) + self.step)
        device, count = self._alphas.device, config.batch_size
        chosen = torch.randint(len(examples.latents), (count,), generator=generator)
        t = torch.randint(len(self._alphas), (count,), generator=generator)
        no_caption, no_view = torch.rand(2, count, generator=generator)
        variant = torch.where(no_caption < config.no_caption, 2, (no_view < config.no_view).long())
        noise = torch.randn(count, *examples.latents.shape[1:], generator=generator)
        chosen, t, variant, noise = (draw.to(device, non_blocking=True) for draw in (chosen, t, variant, noise))
        x = examples.latents[chosen]
        alpha = self._alphas[t].view(-1, 1, 1, 1)
        x_t = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        target = noise if config.prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * x

        embeddings = self.text_encoder(examples.tokens[chosen, variant]).last_hidden_state
        predicted = self.unet(x_t, t, encoder_hidden_states=embeddings).sample
        loss = F.mse_loss(predicted, target)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(self.step, config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step(self.parameters)
        return loss.detach()

    def save(self) -> None:
        """Write the checkpoint, then the model with the averaged weights.

        Raises:
            UserError: if the disk is full or the folder cannot be written to.
        """
        config = self.config
        state = {"step": torch.tensor(self.step)}
        for index, (parameter, average) in enumerate(zip(self.parameters, self.ema.shadow_params, strict=True)):
            moments = self.optimizer.state.get(parameter, {})
            tensors = {"weight": parameter.detach(), "average": average}
            tensors |= {name: moments[name] for name in ("exp_avg", "exp_avg_sq") if name in moments}
            state |= {f"{name}.{index}": tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        write_atomically(config.output / OPTIONS, _options(config), "--output")
        write_tensors(config.output / CHECKPOINT, state, "--output", "Make room and continue with --resume.")
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            parts = {"unet": self.unet, "text_encoder": self.text_encoder, "scheduler": self.scheduler}
            for name, part in parts.items():
                _write_part(config.output / name, part.save_pretrained)
            self.vae.save(config.output / "vae", dtype=torch.float32)
        finally:
            self.ema.restore(self.parameters)

    def _tokens(self, text: str) -> Tensor:
        return self.tokenizer(text, padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt").input_ids[0]

    def _load(self) -> None:
        file = self.config.output / CHECKPOINT
        try:
            state = read_tensors(file)
            self.step = int(state["step"])
            for index, (parameter, average) in enumerate(zip(self.parameters, self.ema.shadow_params, strict=True)):
                parameter.data.copy_(state[f"weight.{index}"])
                average.copy_(state[f"average.{index}"])
                if f"exp_avg.{index}" in state:
                    moments = {name: state[f"{name}.{index}"].to(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        except Exception as error:  # a damaged file fails in as many ways as there are kinds of damage
            raise UserError(f"{file} cannot be read: {error}. Start again in another folder.") from error
        self.ema.optimization_step = self.step


@torch.no_grad()
def draw_samples(
    model: DiffusionModel,
    vae: VAE,
    prompts: Sequence[str],
    cells: int,
    steps: int = 25,
    scale: float = 5.0,
    seed: int = 0,
) -> Tensor:
    """Return a picture of each prompt, drawn from noise by DDIM (arXiv 2010.02502), on the autoencoder's device.

    Args:
        model: predicts the noise.
        vae: decodes.
        prompts: N texts.
        cells: rows and columns of the latents.
        steps: of DDIM.
        scale: of classifier-free guidance.
        seed: of the noise.

    Returns:
        [N, H, W, 3] in [0, 1].
    """
    embeddings = TextEmbedder(model, vae.device)([*prompts, *[""] * len(prompts)])
    denoiser = model.load_denoiser(vae.device)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), vae.latent_channels, cells, cells, generator=generator).to(vae.device)
    levels = torch.linspace(len(denoiser.alphas_cumprod) - 1, 0, steps).long().to(vae.device)
    alphas = torch.cat([denoiser.alphas_cumprod[levels], torch.ones(1, device=vae.device)])
    for t, alpha, next_alpha in zip(levels, alphas[:-1], alphas[1:], strict=True):
        prompt, empty = denoiser.predict(x.repeat(2, 1, 1, 1), t.expand(len(embeddings)), embeddings).chunk(2)
        x = ddim_step(x, empty + scale * (prompt - empty), alpha, next_alpha)
    side = cells * vae.spatial_factor
    return vae.decode(vae.unscale(x), side, side)


def schedule(step: int, steps: int) -> float:
    """Return the share of the largest learning rate at a step: a linear rise, then a cosine down to 0."""
    warm_up = max(1, min(100, steps // 10))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


class Views(NamedTuple):
    """Encoded pictures."""

    latents: Tensor
    """[N, C, h, w], scaled, on the CPU."""
    names: list[str]
    """N captions without the view."""
    captions: list[str]
    """N captions with it."""


def load_views(config: ToyDiffusionConfig, vae: VAE) -> Views:
    """Render and encode the pictures of the objects, or read them from the output folder if they are there."""
    from lrf_nerfstudio.guidance.toy_objects import OBJECTS, render_views

    total = config.views * len(OBJECTS)

    def compute() -> dict[str, Tensor]:
        latents, names, captions = [], [], []
        views = render_views(config.orbits, config.views, vae.spatial_factor)
        for view in track(views, "Rendering and encoding pictures", total):
            latents.append(vae.scale(vae.encode(view.image[None]))[0].cpu())
            names.append(view.name)
            captions.append(view.caption)
        texts = torch.tensor(list(json.dumps([names, captions]).encode()), dtype=torch.uint8)
        return {"latents": torch.stack(latents), "texts": texts}

    inputs = {
        "format": _DATA_FORMAT,
        "orbits": asdict(config.orbits),
        "views": config.views,
        "vae": [vae.fingerprint, vae.scaling_factor, vae.shift_factor],
    }
    entry = TensorCache(config.output / "latents", "--output").load_or_compute(inputs, compute)
    names, captions = json.loads(bytes(entry["texts"].tolist()))
    return Views(entry["latents"], names, captions)


def make_unet(config: ToyDiffusionConfig, latent_channels: int) -> "UNet2DConditionModel":
    """Return a U-Net with random weights: the layout of Stable Diffusion's, with attention at the coarser levels."""
    from diffusers import UNet2DConditionModel

    coarse = len(config.channels) - 1
    return UNet2DConditionModel(
        sample_size=config.orbits.cells,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=config.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * coarse),
        up_block_types=(*["CrossAttnUpBlock2D"] * coarse, "UpBlock2D"),
        cross_attention_dim=config.embedding_size,
        attention_head_dim=4,  # the number of heads, in this class of diffusers
        norm_num_groups=16,
    )


def make_text_encoder(embedding_size: int, tokenizer: "CLIPTokenizer") -> "CLIPTextModel":
    """Return a CLIP text encoder of two layers with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=embedding_size,
            intermediate_size=4 * embedding_size,
            projection_dim=embedding_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Write a tokenizer as CLIP's: pairs of bytes are merged that are frequent in some texts; any text can be read.

    Raises:
        UserError: if transformers is missing, or the folder cannot be written to.
    """
    try:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError(
            "The tokenizer is made by transformers, which is not installed: pip install 'lrf-nerfstudio[text]'."
        ) from error
    words = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", show_progress=False)
    words.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(words.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(first + second for first, second in merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": PROMPT_TOKENS,
        **{"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END},
    }
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(f"{first} {second}" for first, second in merges)]) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
    for name, content in files.items():
        write_atomically(folder / name, content.encode(), "--output")


def _load_tokenizer(folder: Path) -> "CLIPTokenizer":
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _options(config: ToyDiffusionConfig) -> bytes:
    """Return all that decides what a run computes."""
    options = {name: value for name, value in asdict(config).items() if name not in config.free_options}
    return (json.dumps(options, indent=2, sort_keys=True) + "\n").encode()


def _check_output(config: ToyDiffusionConfig) -> None:
    """Check that a run can begin in its output folder, or continue there."""
    output = config.output
    make_folder(output, "--output")
    if not config.resume:
        if (output / CHECKPOINT).exists():
            raise UserError(f"{output} (--output) holds a run already: add --resume to continue it, or choose another.")
        if set(os.listdir(output)) - {"latents", "tokenizer", OPTIONS}:  # of a run that was stopped at once
            raise UserError(f"{output} (--output) is not empty. Choose a new folder; nothing is overwritten.")
        return
    if not (output / CHECKPOINT).exists():
        raise UserError(f"There is no run to --resume in {output} (--output).")
    try:
        same = (output / OPTIONS).read_bytes() == _options(config)
    except OSError:
        same = False
    if not same:
        raise UserError(
            f"{output} (--output) holds a run with other options; see {OPTIONS} there. Use those, or another --output."
        )


def _write_part(folder: Path, save: Callable[[Path], object]) -> None:
    """Write a part of the model by `save_pretrained`; each of its files is complete or as before."""
    temporary = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        with quiet():
            save(temporary)
        folder.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes files for their owner alone
            os.replace(file, folder / file.name)
    except OSError as error:
        raise unwritable(folder, error, "--output") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
