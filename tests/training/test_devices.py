"""Steps of all trainings on a GPU that is not there: everything is on one device, and nothing is waited for."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import PartialState
from fake_cuda import DEVICE, Waits, fake_cuda
from shifted_views import shifted_views
from tiny_pairs import write_pairs
from tiny_runs import (
    batch_of,
    generic_config,
    make_task,
    pretrain_config,
    stage1_config,
    stage3_config,
    write_kl,
    write_tiny,
)

from lrf_nerfstudio.training import loop
from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.task import Task

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def on_fake_cuda(monkeypatch):
    """Accelerate takes the fake GPU for the process's own, and nothing is saved: values would be read."""
    make_accelerator = loop.make_accelerator

    def with_fake_device(config):
        is_fp16 = config.mixed_precision == "fp16"  # which accelerate and the loop refuse on this machine
        accelerator = make_accelerator(replace(config, mixed_precision="no") if is_fp16 else config)
        PartialState().device = accelerator.state.device = DEVICE
        if is_fp16:
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.scaler = torch.amp.GradScaler("cuda")
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", with_fake_device)
    monkeypatch.setattr(Trainer, "save", lambda self: None)


def assert_steps_wait_for_nothing(config, task: Task) -> None:
    batch = batch_of(task, config.batch_size)
    with fake_cuda() as gpu:
        trainer = Trainer(config, task)
        on_gpu = {name: value.to(DEVICE, non_blocking=True) for name, value in batch.items()}
        with gpu.no_waiting():
            for trainer.step in range(2):
                for _ in range(config.gradient_accumulation):
                    trainer.train_on(on_gpu)
        averages = trainer.ema.shadow_params
        for tensor in (*trainer._trained, *averages, *(parameter.grad for parameter in trainer._trained)):
            assert tensor is None or tensor.device == DEVICE
        assert set(trainer._means._sums) >= set(task.reconstruction_terms)
        with pytest.raises(Waits):  # as the losses are read
            trainer.read_losses()


ALL = {"feature_weight": 0.1, "lpips_weight": 0.1, "gan_weight": 0.5, "gan_start": 1}
PATCH = {"gan_weight": 0.5, "gan_start": 0, "discriminator": "patch"}
ACCUMULATION = {"gradient_accumulation": 2}
BF16, FP16 = {"mixed_precision": "bf16"}, {"mixed_precision": "fp16"}


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all losses"])
def test_pretraining(tmp_path, photographs, weights_in_cache, options):
    config = pretrain_config(tmp_path / "run", photographs, **options)
    assert_steps_wait_for_nothing(config, make_task(config))


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (write_tiny, ALL),
        (write_kl, PATCH),
        (write_kl, {"original_decoder_weight": 0.5} | ACCUMULATION | BF16),
        (write_tiny, {"tune": "decoder"} | PATCH | FP16),
    ],
    ids=["tiny, all losses", "kl, patch", "kl, original decoder, accumulation, bf16", "tiny, decoder alone, fp16"],
)
def test_stage1(tmp_path, weights_in_cache, write, options):
    config = stage1_config(tmp_path / "run", write(tmp_path / "vae"), synthetic_share=0.5, **options)
    assert_steps_wait_for_nothing(config, make_task(config, [shifted_views(tmp_path)]))


@pytest.mark.parametrize(
    ("write", "options"),
    [(write_tiny, {"clean_share": 0.5}), (write_tiny, ACCUMULATION | PATCH | BF16), (write_kl, ALL)],
    ids=["tiny, clean latents", "tiny, accumulation, patch, bf16", "kl, all losses"],
)
def test_stage3(tmp_path, weights_in_cache, write, options):
    vae = write(tmp_path / "vae")
    write_pairs(tmp_path / "pairs" / "scene", vae, masked=True)
    config = stage3_config(tmp_path / "run", vae, tmp_path / "pairs", **options)
    assert_steps_wait_for_nothing(config, make_task(config))


@pytest.mark.parametrize("options", [{}, ALL, BF16], ids=["plain", "all losses", "bf16"])
def test_generic_decoder(tmp_path, weights_in_cache, options):
    vae = write_tiny(tmp_path / "vae")
    write_pairs(tmp_path / "pairs" / "scene", vae, masked=True, density=2)
    config = generic_config(tmp_path / "run", vae, tmp_path / "pairs", **options)
    assert_steps_wait_for_nothing(config, make_task(config))


@pytest.mark.parametrize(
    "wait", ["loss.item()", "bool(loss > 0)", "images[mask]", "torch.tensor([0.5, 0.5, 0.5]).to(images)"]
)
def test_what_waits_is_noticed(tmp_path, photographs, monkeypatch, wait):
    config = pretrain_config(tmp_path / "run", photographs)
    task = make_task(config)
    losses = task.losses

    def waiting(network, batch):
        result = losses(network, batch)
        names = {"loss": result.total(), "images": result.images, "mask": result.images > 0.5, "torch": torch}
        eval(wait, names)
        return result

    monkeypatch.setattr(task, "losses", waiting)
    with pytest.raises(Waits):
        assert_steps_wait_for_nothing(config, task)
