"""The entry for nerfstudio/configs/external_methods.py."""

from nerfstudio.configs.external_methods import ExternalMethod, external_methods

# Latent-Splatfacto
external_methods.append(
    ExternalMethod(
        """[bold yellow]Latent-Splatfacto[/bold yellow]
For more information visit: https://docs.nerf.studio/nerfology/methods/latent_splatfacto.html

To enable Latent-Splatfacto, you must install it first by running:
  [grey]pip install lrf-nerfstudio[/grey]""",
        configurations=[
            (
                "latent-splatfacto",
                "Latent radiance field: Gaussian splatting in the latent space of a VAE, on a GPU or a CPU.",
            ),
            (
                "latent-splatfacto-sd",
                "Latent radiance field in the latent space of Stable Diffusion; for GPUs.",
            ),
            (
                "latent-dreamsplat",
                "Text to 3D: Gaussians in a latent space, guided by a latent diffusion model such as Stable Diffusion.",
            ),
        ],
        pip_package="lrf-nerfstudio",
    )
)
