"""A trained model as a field apart from nerfstudio."""

import torch
from torch import Tensor

from lrf_nerfstudio.field import LatentField
from lrf_nerfstudio.plugin.model import LatentSplatfactoModel


def exported_field(model: LatentSplatfactoModel, scene_transform: Tensor, scene_scale: float) -> LatentField:
    """Return the trained field with all its channels, apart from nerfstudio.

    Args:
        model: trained.
        scene_transform: [3, 4], from the data set's coordinates to the scene's, before scaling.
        scene_scale: factor from the data set's lengths to the scene's.
    """
    bases = (model.active_sh_degree + 1) ** 2
    return LatentField(
        means=model.means.detach(),
        quats=model.quats.detach(),
        scales=torch.exp(model.scales.detach()),
        opacities=torch.sigmoid(model.opacities.detach()).squeeze(-1),
        features=torch.cat([model.features_dc[:, None], model.features_rest], dim=1).detach()[:, :bases],
        background=model.background(),
        normalization=model.normalization,
        linear_rgb=model.linear_rgb,
        spatial_factor=model.vae.spatial_factor,
        dilation=model.config.dilation,
        antialiased=model.config.rasterize_mode == "antialiased",
        vae_source=model.vae.source,
        vae_fingerprint=model.vae.fingerprint,
        scene_transform=scene_transform,
        scene_scale=scene_scale,
        decoder=model.scene_decoder if model.decoder_is_fitted else None,
    )
