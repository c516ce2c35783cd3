"""The measures of latents, on latents made by hand and on photographs that are shifted copies of each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from averaging_vae import averaging_vae
from PIL import Image

from lrf_nerfstudio.correspondence import PairMatches, Scene, SceneCorrespondences, View
from lrf_nerfstudio.evaluation.latents import LatentMeasures, match_distances, measure_scene
from lrf_nerfstudio.evaluation.metrics import psnr, psnr_and_ssim
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.utils.images import read_image
from lrf_nerfstudio.vae import VAE

SHIFT = 8  # pixels, a multiple of the VAE's factor 4


def read_photograph(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32) / 255)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """[60, 88, 3] uint8 with structure of all sizes."""
    generator = np.random.default_rng(0)
    total = np.zeros((60, 88, 3))
    for size in (4, 9, 20, 60):
        coarse = Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((88, 60), Image.Resampling.BICUBIC)) / 4
    return total.astype(np.uint8)


@pytest.fixture
def correspondences(picture: np.ndarray, tmp_path: Path) -> SceneCorrespondences:
    """Three photographs, each shifted by 8 pixels against the one before; they have different sizes."""
    views = []
    for index, width in enumerate((66, 64, 70)):
        path = tmp_path / f"{index}.png"
        Image.fromarray(picture[:, SHIFT * index : SHIFT * index + width]).save(path)
        views.append(View(path, width, 60))
    generator = np.random.default_rng(1)
    pairs = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        points = generator.uniform((32, 16), (50, 44), (40, 2)).astype(np.float32)  # away from borders in either
        pairs.append(PairMatches(i, j, points, points - np.float32([SHIFT * (j - i), 0])))
    return SceneCorrespondences(Scene(tmp_path, tuple(views)), tuple(pairs), np.ones(3, np.float32))


def test_distances_by_hand() -> None:
    first = torch.tensor([[0.0, 1.0], [4.0, 1.0]])
    second = torch.tensor([[1.0, 1.0], [4.0, 3.0]])
    matched, shuffled = match_distances(first, second)
    assert matched.tolist() == [1.0, 2.0]
    assert shuffled.tolist() == [4.0 + 3.0, 2.0 + 0.0]  # with two points, each meets the other's partner


@pytest.mark.parametrize("count", [2, 3, 50])
def test_shuffled_partners_are_all_of_them_and_never_the_own(count: int) -> None:
    """Powers of 2 tell which ones met: a point meeting its own partner would add 0."""
    values = 2.0 ** torch.arange(count, dtype=torch.float64)[:, None]
    matched, shuffled = match_distances(values, values, seed=3)
    assert matched == 0
    assert shuffled >= float((values[1:] - values[:-1]).sum())
    assert torch.equal(shuffled, match_distances(values, values, seed=3)[1])
    one_sided, _ = match_distances(torch.zeros_like(values), values)
    shuffled_one_sided = match_distances(torch.zeros_like(values), values)[1]
    assert one_sided == shuffled_one_sided == 2**count - 1  # every partner is met once


def test_independent_latents_are_as_far_apart_as_random_ones_and_scale_cancels() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 20000, 3, generator=generator)
    matched, shuffled = match_distances(first, second)
    torch.testing.assert_close(matched / shuffled, torch.ones(3).double(), atol=0.02, rtol=0)
    scaled, scaled_shuffled = match_distances(1 - 5 * first, 1 - 5 * second)
    torch.testing.assert_close(scaled / scaled_shuffled, matched / shuffled, atol=1e-5, rtol=0)


def test_shifted_photographs_are_consistent_where_they_match(correspondences: SceneCorrespondences) -> None:
    vae = averaging_vae()
    measures = measure_scene(correspondences, {"averaging": vae}, "averaging")["averaging"]
    assert measures.inconsistency is not None and measures.inconsistency < 1e-5
    assert (measures.images, measures.pairs, measures.correspondences) == (3, 3, 120)

    half_a_cell = tuple(PairMatches(p.i, p.j, p.points_i, p.points_j + 2) for p in correspondences.pairs)
    moved = SceneCorrespondences(correspondences.scene, half_a_cell, correspondences.weights)
    worse = measure_scene(moved, {"averaging": vae}, "averaging")["averaging"].inconsistency
    assert worse is not None and 0.1 < worse < 1


def test_reconstruction_spread_and_reference(correspondences: SceneCorrespondences) -> None:
    vae = averaging_vae()
    calls: list[None] = []
    measures = measure_scene(correspondences, {"averaging": vae}, "averaging", lambda: calls.append(None))["averaging"]
    assert len(calls) == 3
    photographs = [read_photograph(view.path) for view in correspondences.scene.views]
    latents = [vae.encode(photograph[None])[0] for photograph in photographs]
    quality = [
        psnr_and_ssim(vae.decode(latent[None], *photograph.shape[:2])[0], photograph)
        for photograph, latent in zip(photographs, latents, strict=True)
    ]
    assert measures.reconstruction_psnr == pytest.approx(np.mean([q["psnr"] for q in quality]))
    assert measures.reconstruction_ssim == pytest.approx(np.mean([q["ssim"] for q in quality]))
    assert measures.detail is not None and 0 <= measures.detail < 0.1  # it averages detail away
    values = torch.cat([latent.flatten(1) for latent in latents], dim=1).double()
    assert measures.latent_std == pytest.approx(values.std(1, correction=0).tolist())
    assert measures.latent_drift == 0 and measures.latent_std_ratio == [1.0] * 4
    assert measures.original_decoder_psnr == measures.reconstruction_psnr


def scaled(vae: VAE, scale: float, offset: float) -> VAE:
    """The same autoencoder with latents `scale * z + offset` from its encoder, and a decoder that expects z."""
    last = vae.autoencoder.encoder.layers[-1]
    last.weight.data *= scale
    last.bias.data = last.bias * scale + offset
    return vae


def test_a_latent_space_of_another_scale_differs_in_drift_and_deviation_alone(
    correspondences: SceneCorrespondences,
) -> None:
    vaes = {"double": scaled(averaging_vae(), 2.0, 0.0), "plain": averaging_vae()}
    measures = measure_scene(correspondences, vaes, "plain")
    assert list(measures) == ["double", "plain"]
    double, plain = measures["double"], measures["plain"]
    assert double.inconsistency == pytest.approx(plain.inconsistency, abs=1e-6)
    for powers in zip(double.spectrum, plain.spectrum, strict=True):
        assert powers == (None, None) or powers[0] == pytest.approx(powers[1], rel=1e-4)
    assert sum(power is not None for power in plain.spectrum) > 8
    assert double.latent_std_ratio == pytest.approx([2.0] * 4)
    assert plain.latent_drift == 0 and plain.latent_std_ratio == [1.0] * 4
    # |2 z - z| = |z|
    vae = averaging_vae()
    latents = [vae.encode(read_photograph(view.path)[None])[0].flatten(1) for view in correspondences.scene.views]
    values = torch.cat(latents, dim=1)
    expected = values.abs().mean() / values.std(1, correction=0).mean()
    assert double.latent_drift == pytest.approx(float(expected), rel=1e-5)

    moved = {"plain": averaging_vae(), "moved": scaled(averaging_vae(), 1.0, 0.5)}
    by_half = measure_scene(correspondences, moved, "plain")["moved"]
    assert by_half.latent_drift == pytest.approx(0.5 / np.mean(plain.latent_std), rel=1e-5)
    assert by_half.latent_std_ratio == pytest.approx([1.0] * 4)

    expected = []
    for photograph in (read_photograph(view.path) for view in correspondences.scene.views):
        latents = moved["moved"].encode(photograph[None])
        expected.append(psnr(moved["plain"].decode(latents, *photograph.shape[:2])[0], photograph))
    assert by_half.original_decoder_psnr == pytest.approx(np.mean(expected))
    assert by_half.original_decoder_psnr < plain.reconstruction_psnr - 1


def test_latents_of_another_shape_have_no_drift(correspondences: SceneCorrespondences) -> None:
    measures = measure_scene(correspondences, {"4": averaging_vae(4), "5": averaging_vae(5)}, "4")
    assert measures["4"].latent_drift == 0
    assert measures["5"].latent_drift is None and measures["5"].latent_std_ratio is None
    assert measures["5"].original_decoder_psnr is None
    assert len(measures["5"].latent_std) == len(measures["5"].inconsistency_by_channel) == 5


def test_channels_that_are_constant_have_no_inconsistency(correspondences: SceneCorrespondences) -> None:
    vae = averaging_vae()
    last = vae.autoencoder.encoder.layers[-1]
    last.weight.data[3], last.bias.data[3] = 0.0, 0.0
    measures: LatentMeasures = measure_scene(correspondences, {"flat": vae}, "flat")["flat"]
    assert measures.inconsistency_by_channel[3] is None and measures.inconsistency is not None
    assert measures.latent_std[3] == 0 and measures.latent_std_ratio is not None
    assert measures.latent_std_ratio[3] is None
    assert any(power is not None for power in measures.spectrum)


def test_bad_input_is_named(correspondences: SceneCorrespondences) -> None:
    vae = averaging_vae()
    nothing = SceneCorrespondences(correspondences.scene, (), np.ones(0, np.float32))
    with pytest.raises(UserError, match="no correspondences"):
        measure_scene(nothing, {"a": vae}, "a")
    vae.autoencoder.encoder.layers[-1].bias.data[0] = torch.nan
    with pytest.raises(UserError, match=r"VAE a makes NaN or infinity of .*0\.png"):
        measure_scene(correspondences, {"a": vae}, "a")
    path = correspondences.scene.views[1].path
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"1\.png is not a readable image"):
        measure_scene(correspondences, {"a": averaging_vae()}, "a")


def test_pixels_are_read_as_they_lie_in_the_file(tmp_path: Path) -> None:
    """Whatever orientation the camera noted down: the scene's cameras and matches know the file's own pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), pixels)
