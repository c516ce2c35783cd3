"""What NerfBaselines learns of this method from the entry point `nerfbaselines.specs`; nothing heavy is imported."""

from nerfbaselines import register

register(
    {
        "id": "latent-splatfacto",
        "method_class": "lrf_nerfstudio.plugin.nerfbaselines_method:LatentSplatfacto",
        "backends_order": ["python"],
        "metadata": {
            "name": "Latent Splatfacto",
            "description": "3D Gaussian splatting in the latent space of an autoencoder, with a decoder of the scene's "
            "own.",
            "paper_title": "Latent Radiance Fields with 3D-aware 2D Representations",
            "paper_authors": ["Chaoyi Zhou", "Xi Liu", "Feng Luo", "Siyu Huang"],
            "paper_link": "https://arxiv.org/abs/2502.09613",
            "licenses": [{"name": "Apache 2.0"}],
        },
        "presets": {
            # The method of the paper: the whole run is on latents, and the VAE decodes.
            "paper": {"pipeline.model.scene-decoder.share": 0.0},
            "rgb": {"pipeline.vae.source": "rgb", "pipeline.model.scene-decoder.share": 0.0},
        },
    }
)
