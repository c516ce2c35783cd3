"""The generic decoder: it makes the same pictures of a scene's field latents as of latents, and its file."""

import pytest
import torch
from test_decoder import maps, trained

from lrf_nerfstudio.field.generic_decoder import FILE, for_field, load_generic, save_generic, shipped_generic
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def vae(tiny_vae) -> VAE:
    return VAEConfig(str(tiny_vae)).setup()


@pytest.mark.parametrize(("channels", "factor", "cell"), [(4, 4, 4), (16, 8, 4), (4, 8, 8)])
def test_pictures_of_field_latents_are_those_of_latents(channels, factor, cell):
    generic, (_, normalization) = trained(channels, factor, cell), maps(channels)
    field = torch.rand(*generic.dense_size(24 * factor, 20 * factor), channels)
    latents = normalization.to_latent(field).permute(1, 2, 0)
    decoder = for_field(generic, normalization)
    with torch.no_grad():
        expected, picture = generic(latents), decoder(field)
        inside = slice(decoder.margin * cell, -decoder.margin * cell)  # the edge of the grid is not seen from there
        assert picture[inside, inside].numel() > 0
        torch.testing.assert_close(picture[inside, inside], expected[inside, inside], atol=1e-4, rtol=1e-4)
        for parameter in (*generic.tail.parameters(), *decoder.tail.parameters()):
            torch.nn.init.zeros_(parameter)
        torch.testing.assert_close(decoder(field), generic(latents), atol=1e-5, rtol=1e-5)


def test_the_generic_decoder_stays_as_it_is():
    generic = trained()
    before = {name: tensor.clone() for name, tensor in generic.state_dict().items()}
    decoder = for_field(generic, maps(4)[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in generic.state_dict().items())
    assert all(parameter.requires_grad for parameter in decoder.parameters())
    assert not torch.equal(decoder.head.weight, generic.head.weight)


def test_a_file_holds_all_of_it(tmp_path, vae):
    generic = trained(vae.latent_channels, vae.spatial_factor, cell=4)
    save_generic(generic, vae, tmp_path / FILE)
    read = load_generic(tmp_path / FILE, vae)
    assert read.config == generic.config
    for name, tensor in generic.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def test_a_file_that_is_none_is_refused(tmp_path, vae, tiny_vae):
    generic = trained(vae.latent_channels, vae.spatial_factor, cell=4)
    path = tmp_path / FILE
    with pytest.raises(UserError, match="cannot be read"):
        load_generic(path, vae)
    save_generic(generic, vae, path)
    with pytest.raises(UserError, match="for the latents of the VAE"):
        load_generic(path, VAEConfig("lrf-f4c4").setup())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_generic(path, vae)
    path.write_bytes((tiny_vae / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(UserError, match="no generic decoder of this version"):
        load_generic(path, vae)


def test_a_vae_without_one_has_none(vae):
    assert shipped_generic(vae) is None
