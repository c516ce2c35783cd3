"""Features of networks trained on ImageNet, which timm or torchvision know by name."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from lrf_nerfstudio.utils.deprecations import no_jit_warning
from lrf_nerfstudio.utils.errors import UserError

STAGES = 4
"""Resolutions at which features are taken, the finest ones of a network."""


class ImageNetFeatures(nn.Module):
    """The first stages of a network with its ImageNet weights, frozen.

    The default of the options, EfficientNet-Lite0 (Tan & Le 2019), is small enough for a processor, and the kind of
    network with which Projected GANs (Sauer et al. 2021) look at images.

    Attributes:
        channels: of the features of each stage; for most networks at 1/2, 1/4, 1/8 and 1/16 of the resolution.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, download: bool = False) -> None:
        """Load a network.

        Args:
            name: of the network in timm; else in torchvision.
            download: whether its weights may be downloaded where PyTorch's cache lacks them.

        Raises:
            UserError: if there is no such network, it has no features of several resolutions, or its file is damaged.
            OSError: if its weights are not in PyTorch's cache, or cannot be downloaded.
        """
        super().__init__()
        loaded = _load(name, download)
        self.network, self.channels = loaded.network, loaded.channels
        self.register_buffer("mean", torch.tensor(loaded.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(loaded.std)[:, None, None], persistent=False)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "ImageNetFeatures":
        """Stay in evaluation mode: the statistics of the normalization layers are ImageNet's."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features [B, channels, h, w] of each stage for images [B, 3, H, W] in [0, 1]."""
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features: list[Tensor] = self.network(x)
        return features


@dataclass(frozen=True)
class _Loaded:
    """A network with the mean and deviation of the colors that it was trained on."""

    network: nn.Module
    channels: list[int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _load(name: str, download: bool) -> _Loaded:
    with no_jit_warning():
        import timm
    import torchvision

    if timm.is_model(name):
        load: Callable[[str, bool], _Loaded] = _load_from_timm
    elif name in torchvision.models.list_models(module=torchvision.models):
        load = _load_from_torchvision
    else:
        raise UserError(f"--feature-network {name}: neither timm nor torchvision has a network of this name.")
    try:
        return load(name, download)
    except OSError:
        raise
    except Exception as error:  # damaged or unsafe files and unsuitable networks surface as many types
        raise UserError(f"--feature-network {name} cannot be used: {error}.") from error


def _load_from_timm(name: str, download: bool) -> _Loaded:
    import timm

    described: dict[str, Any] = timm.create_model(name).pretrained_cfg
    network = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg={**described, "file": str(_weights_file(described.get("url"), download))},
        features_only=True,
        out_indices=tuple(range(STAGES)),
    )
    return _Loaded(network, network.feature_info.channels(), described["mean"], described["std"])


def _weights_file(url: str | None, download: bool) -> Path:
    """Return the file in PyTorch's cache that holds what a URL leads to.

    Raises:
        OSError: if it is not there, or cannot be downloaded.
    """
    if not url:
        raise FileNotFoundError("no file of weights is published")
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not file.exists():
        if not download:
            raise FileNotFoundError(f"{file} is missing")
        file.parent.mkdir(parents=True, exist_ok=True)
        hash_prefix = re.search(r"-([0-9a-f]{8})\.", file.name)
        try:
            torch.hub.download_url_to_file(url, str(file), hash_prefix[1] if hash_prefix else None)
        except RuntimeError as error:  # the hash is wrong
            raise OSError(f"{url}: {error}") from error
    return file


def _load_from_torchvision(name: str, download: bool) -> _Loaded:
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    network = torchvision.models.get_model(name).eval()
    network.load_state_dict(torch.load(_weights_file(weights.url, download), map_location="cpu", weights_only=True))
    preset = weights.transforms()
    return _Loaded(*_first_stages(network), tuple(preset.mean), tuple(preset.std))


def _first_stages(network: nn.Module) -> tuple[nn.Module, list[int]]:
    """Cut off a network after its finest resolutions.

    The features of a resolution are those of the last node of the graph with this resolution that everything after it
    depends on, which leaves out nodes inside of residual blocks.

    Returns:
        A module that returns the features of each resolution; their channels.
    """
    from torch.fx import Node, symbolic_trace
    from torch.fx.passes.shape_prop import ShapeProp

    side = 2 ** (STAGES + 3)
    traced = symbolic_trace(network)
    ShapeProp(traced).propagate(torch.zeros(1, 3, side, side))
    nodes = list(traced.graph.nodes)
    position = {node: number for number, node in enumerate(nodes)}
    stages: dict[int, tuple[Node, int]] = {}  # by the side of the features
    last_use = 0  # position of the last node that depends on a node before this one
    for number, node in enumerate(nodes):
        shape: tuple[int, ...] = getattr(node.meta.get("tensor_meta"), "shape", ())
        is_map = len(shape) == 4 and shape[-1] == shape[-2]
        if is_map and shape[-1] > min(stages, default=side):
            break  # pooling to a fixed size
        if is_map and last_use <= number and 1 < shape[-1] < side:
            stages[shape[-1]] = node, shape[1]
        last_use = max([last_use, *(position[user] for user in node.users)])
    if len(stages) < STAGES:
        raise ValueError(f"it has features of {len(stages)} resolutions, {STAGES} are needed")
    chosen = [stages[resolution] for resolution in sorted(stages, reverse=True)[:STAGES]]
    nodes[-1].args = ([node for node, _ in chosen],)  # the node of the output
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, [channels for _, channels in chosen]
