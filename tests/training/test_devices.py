"""Steps of all trainings on a GPU that is not there: everything is on one device, and the host waits for nothing."""

from pathlib import Path

import pytest
import torch
from fake_cuda import DEVICE, FakeGPU, fake_cuda
from shifted_views import shifted_views
from tiny_pairs import write_pairs
from tiny_runs import QUICK, photographs, pretrain_config, tiny_config, write_kl, write_tiny

from lrf_nerfstudio.training import loop
from lrf_nerfstudio.training.loop import Trainer
from lrf_nerfstudio.training.pretrain import Pretrain
from lrf_nerfstudio.training.stage1 import Stage1
from lrf_nerfstudio.training.stage3 import Stage3, Stage3Config
from lrf_nerfstudio.training.task import Task
from lrf_nerfstudio.utils.errors import UserError


@pytest.fixture
def on_fake_cuda(monkeypatch):
    """Let accelerate take the fake GPU for its own; nothing is saved, for which values would be read."""
    make_accelerator = loop.make_accelerator

    def with_fake_device(config):
        accelerator = make_accelerator(config)
        accelerator.state.device = DEVICE
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", with_fake_device)
    monkeypatch.setattr(Trainer, "save", lambda self: None)


def place(gpu: FakeGPU, task: Task) -> None:
    for module in (task.network, getattr(task, "original", None), task.perceptual._features, task.perceptual._lpips):
        if module is not None:
            gpu.place(module)


def test_x(tmp_path, on_fake_cuda):
    config = tiny_config(tmp_path/"run", write_kl(tmp_path/"vae"))
    task = Stage1(config, [shifted_views(tmp_path)])
    batch = torch.utils.data.default_collate([task.dataset[index] for index in range(2)])
    with fake_cuda() as gpu:
        trainer = Trainer(config, task)
        batch = {n: gpu.place(v) for n, v in batch.items()}
        with gpu.no_waiting():
            for _ in range(3):
                trainer.train_on(batch)
                trainer.step += 1
        for p in task.network.parameters(): print(p.device, p.shape)
