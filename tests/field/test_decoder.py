"""The scene's own decoder: where it starts, that parts equal the whole, that it learns, and its files."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import fake_cuda

from lrf_nerfstudio.field.decoder import (
    PHASES,
    SceneDecoder,
    Window,
    mean_of_cells,
    random_window,
    windows,
)
from lrf_nerfstudio.field.similarity import picture_similarity
from lrf_nerfstudio.splatting import Gaussians, RasterSettings, rasterize
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.files import read_tensors, write_tensors
from lrf_nerfstudio.vae import FieldNormalization, LinearRGB


def maps(channels: int) -> tuple[LinearRGB, FieldNormalization]:
    generator = torch.Generator().manual_seed(channels)
    linear_rgb, normalization = LinearRGB(channels), FieldNormalization(channels)
    linear_rgb.matrix.copy_(torch.randn(3, channels, generator=generator) / channels)
    linear_rgb.bias.copy_(torch.rand(3, generator=generator))
    normalization.shift.copy_(torch.randn(channels, generator=generator))
    normalization.scale.copy_(0.5 + torch.rand(channels, generator=generator))
    return linear_rgb, normalization


def trained(channels: int = 4, factor: int = 4, cell: int = 4, width: int = 8, blocks: int = 2) -> SceneDecoder:
    """A decoder with weights as large as after some training."""
    torch.manual_seed(0)
    decoder = SceneDecoder(channels, factor, cell, width, blocks)
    decoder.start_from(*maps(channels))
    with torch.no_grad():
        for parameter in decoder.tail.parameters():
            parameter.normal_(std=0.1)
    return decoder


@pytest.mark.parametrize(
    ("channels", "factor", "cell"), [(4, 4, 4), (4, 8, 8), (4, 8, 4), (16, 8, 4), (5, 2, 4), (3, 1, 1)]
)
def test_it_starts_from_the_linear_map_of_the_latents(channels, factor, cell):
    linear_rgb, normalization = maps(channels)
    decoder = SceneDecoder(channels, factor, cell)
    decoder.start_from(linear_rgb, normalization)
    height, width = 6 * factor, 8 * factor - (factor > 1)  # the last cell reaches beyond the picture
    dense = torch.rand(*decoder.dense_size(height, width), channels)
    assert decoder.field_latents(dense).shape == (6, 8, channels)  # the grid that the VAE decodes
    colors = linear_rgb(normalization.to_latent(mean_of_cells(dense, PHASES)))
    enlarged = F.interpolate(colors.permute(2, 0, 1)[None], scale_factor=cell, mode="bilinear")[0].permute(1, 2, 0)
    picture = decoder(dense)
    assert picture.shape == (6 * factor, 8 * factor, 3)
    torch.testing.assert_close(picture, enlarged, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoder.decode(dense, height, width), enlarged[:height, :width].clamp(0, 1))


@pytest.mark.parametrize("cell", [4, 2])
def test_means_of_the_dense_grid_are_as_sharp_as_the_coarse_grid(cell):
    """A Gaussian rendered densely and averaged has the width that it has on the VAE's grid."""
    decoder, dilation = SceneDecoder(1, 4, cell), 0.5
    gaussians = Gaussians(
        means=torch.tensor([[0.02, -0.03, 1.0]]),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        scales=torch.full((1, 3), 0.05),  # one latent pixel
        opacities=torch.tensor([0.9]),
        features=torch.ones(1, 1),
    )

    def variance(cells: int, eps2d: float) -> float:
        """Of a column's place, in square latent pixels."""
        focal, side = 20.0 * cells, 24 * cells
        K = torch.tensor([[focal, 0.0, side / 2], [0.0, focal, side / 2], [0.0, 0.0, 1.0]])
        settings = RasterSettings(side, side, eps2d=eps2d, render_depth=False)
        columns = mean_of_cells(rasterize(gaussians, torch.eye(4)[None], K[None], settings).features[0], cells).sum(0)
        weights, places = (columns / columns.sum())[:, 0], torch.arange(24.0)
        return float((weights * (places - (weights * places).sum()).square()).sum())

    coarse, k = variance(1, dilation), decoder.density
    assert variance(k, decoder.dense_dilation(dilation)) == pytest.approx(coarse, rel=0.01)
    assert variance(k, dilation * k**2) > 1.03 * coarse
    assert decoder.dense_dilation(0.0) > 0


def test_the_mean_of_more_cells():
    dense = torch.rand(12, 8, 3)
    torch.testing.assert_close(mean_of_cells(dense, 4), mean_of_cells(mean_of_cells(dense, 2), 2))


@pytest.mark.parametrize("tile", [5, 11, 64])
def test_parts_equal_the_whole(tile):
    decoder = trained()
    height, width = 4 * 19 - 1, 4 * 23 - 3
    dense = torch.rand(*decoder.dense_size(height, width), 4)
    whole = decoder(dense)[:height, :width].clamp(0, 1)
    torch.testing.assert_close(decoder.decode(dense, height, width, tile), whole, atol=1e-5, rtol=0)


def test_a_pixel_sees_the_margin_and_no_more():
    decoder = trained()
    size = 2 * decoder.margin + 3
    dense = torch.rand(PHASES * size, PHASES * size, 4, requires_grad=True)
    center = Window(decoder.margin + 1, decoder.margin + 1, decoder.margin + 2, decoder.margin + 2)
    decoder(dense)[center.slices(decoder.cell)].sum().backward()
    seen = mean_of_cells(dense.grad.abs(), PHASES).sum(dim=-1) > 0  # [size, size]
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[center.grown(decoder.margin, size, size).slices(1)] = True
    assert torch.equal(seen, inside)


def test_a_window_with_its_margin_is_decoded_as_in_the_whole():
    """What a training step on a large photograph does; at the grid's edge there is no margin."""
    decoder, rows, columns = trained(), 40, 37
    dense = torch.rand(PHASES * rows, PHASES * columns, 4)
    whole, generator = decoder(dense), random.Random(0)
    places = [random_window(rows, columns, 9, generator) for _ in range(8)] + [Window(0, 28, 9, 37)]
    for window in places:
        assert (window.bottom - window.top, window.right - window.left) == (9, 9)
        surrounded = window.grown(decoder.margin, rows, columns)
        picture = decoder(dense[surrounded.slices(PHASES)])[window.slices(decoder.cell, surrounded)]
        torch.testing.assert_close(picture, whole[window.slices(decoder.cell)], atol=1e-5, rtol=0)


def test_random_windows_reach_every_cell_and_fit_small_grids():
    generator, reached = random.Random(1), torch.zeros(7, 5, dtype=torch.bool)
    for _ in range(200):
        reached[random_window(7, 5, 3, generator).slices(1)] = True
    assert reached.all()
    assert random_window(7, 5, 6, generator).right == 5


def test_windows_cover_a_grid_once():
    count = torch.zeros(13, 8)
    for window in windows(13, 8, 5):
        count[window.slices(1)] += 1
    assert (count == 1).all()


def test_it_learns_what_the_linear_map_cannot_show():
    """A picture of finer lines than the coarse grid has cells is in the differences of the dense cells."""
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij")
    photograph = (0.5 + 0.4 * torch.sin(2 * math.pi * (rows + 0.5 * columns) / 6.0))[..., None].expand(-1, -1, 3)
    dense = F.avg_pool2d(photograph.permute(2, 0, 1)[None], 2)[0].permute(1, 2, 0)  # [32, 24, 3]
    decoder = SceneDecoder(3, 4, width=16, blocks=1)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    errors = []
    for _ in range(100):
        picture = decoder(dense)
        errors.append(float(F.mse_loss(picture.detach(), photograph)))
        loss = 0.8 * (picture - photograph).abs().mean() + 0.2 * (1 - picture_similarity(picture, photograph))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert errors[-1] < 0.02 * errors[0]
    assert all(parameter.grad.abs().sum() > 0 for parameter in decoder.parameters())


def test_a_grid_of_another_size_is_refused():
    decoder = SceneDecoder(4, 4)
    with pytest.raises(ValueError, match=r"a grid \(6, 8, 4\), not \(6, 10, 4\)"):
        decoder.decode(torch.rand(6, 10, 4), 12, 16)


# ---------------------------------------------------------------------------------------------------- files


def test_a_saved_decoder_decodes_the_same(tmp_path):
    decoder = trained(channels=16, factor=8, cell=4, width=12, blocks=1)
    write_tensors(tmp_path / "decoder.safetensors", {n: t.contiguous() for n, t in decoder.state_dict().items()})
    tensors = read_tensors(tmp_path / "decoder.safetensors")
    restored = SceneDecoder.restored(dict(decoder.config), tensors, 16, 8, "decoder.safetensors")
    dense = torch.rand(20, 16, 16)
    assert torch.equal(restored.decode(dense, 40, 30), decoder.decode(dense, 40, 30))
    assert restored.config == decoder.config
    assert all(parameter.requires_grad for parameter in restored.parameters())  # it can be trained on


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"channels": 5}, {}, "5 channels and factor 4, not of 4 and 4"),
        ({"factor": 8}, {}, "4 channels and factor 8, not of 4 and 4"),
        ({"cell": 3}, {}, "3 pixels, does not divide 8"),
        ({"cell": 8}, {}, r"of another shape \(tail.bias, tail.weight\)"),
        ({"width": "8"}, {}, "is damaged"),
        ({"width": 0}, {}, "is damaged"),
        ({"blocks": None}, {}, "is damaged"),
        ({"factor": True}, {}, "is damaged"),
        ({}, {"tail.weight": None}, r"incomplete or of another shape \(tail.weight\)"),
        ({}, {"more": torch.zeros(1)}, r"\(more\)"),
    ],
)
def test_what_does_not_fit_is_named(config, tensors, message):
    decoder = trained()
    state = {name: value for name, value in {**decoder.state_dict(), **tensors}.items() if value is not None}
    with pytest.raises(UserError, match=message) as error:
        SceneDecoder.restored({**decoder.config, **config}, state, 4, 4, "scene/field.safetensors")
    assert "scene/field.safetensors" in str(error.value)


def test_a_description_that_is_none_is_named():
    with pytest.raises(UserError, match="is damaged: None"):
        SceneDecoder.restored(None, {}, 4, 4, "scene/field.safetensors")


# ---------------------------------------------------------------------------------------------------- devices


def test_a_step_on_cuda_does_not_wait():
    with fake_cuda() as gpu:
        decoder = gpu.place(SceneDecoder(4, 4))
        optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-3, fused=True)
        dense, photograph = gpu.place(torch.rand(20, 24, 4, requires_grad=True)), gpu.place(torch.rand(38, 45, 3))
        with gpu.no_waiting():
            for _ in range(2):
                picture = decoder(dense)[:38, :45]
                (1 - picture_similarity(picture, photograph) + (picture - photograph).abs().mean()).backward()
                optimizer.step()
            assert decoder.decode(dense, 38, 45, tile=3).device == dense.device
        assert dense.grad.shape == dense.shape
