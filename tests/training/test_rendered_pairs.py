import json
import resource
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from shifted_views import textured_picture
from tiny_pairs import STEPS, write_pairs
from tiny_runs import write_kl, write_tiny

from lrf_nerfstudio.training.data.latent_crops import LatentCrops, cut
from lrf_nerfstudio.training.data.scene_pairs import (
    INDEX,
    VIEWS_PER_FILE,
    PairView,
    ScenePairs,
    check_options,
    read_pairs,
)
from lrf_nerfstudio.utils.errors import UserError
from lrf_nerfstudio.vae import VAEConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return write_tiny(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def vae(source):
    return VAEConfig(source).setup()


def test_what_is_written_is_read_again(tmp_path, source, vae):
    written = write_pairs(tmp_path / "scene", source, masked=True)
    (read,) = read_pairs(tmp_path, vae)
    assert read == written
    image, mask = read.photograph(2)
    assert image.dtype == torch.uint8 and np.array_equal(image.numpy(), textured_picture(90, 119, 20))
    assert mask is not None and not mask[:, :40].any() and mask[:, 40:].all()
    rows, columns = slice(30, 60), slice(100, 130)  # beyond the right edge
    part, part_of_mask = read.photograph(2, rows, columns)
    assert torch.equal(part, image[rows, columns]) and torch.equal(part_of_mask, mask[rows, columns])
    latent = read.latent(2, 100)
    assert latent.shape == (3, 23, 30) == (3, *read.grid(2)) and latent.dtype == torch.float32
    assert torch.equal(read.latent(2, 100, slice(3, 9), slice(20, 40)), latent[:, 3:9, 20:])
    assert not torch.equal(read.latent(2, 50), latent)
    assert read.of_kind("novel") == [0, 3] and read.of_kind("train") == [1, 2, 4, 5]


def test_photographs_are_spread_over_files(tmp_path):
    count = VIEWS_PER_FILE + 2
    views = tuple(PairView(f"{i}.png", "train", 4, 5, mask=False) for i in range(count))
    pairs = ScenePairs(tmp_path, "scene", "vae", "f", 4, {}, [0.0], [1.0], views)
    images = [torch.full((4, 5, 3), i / 255) for i in range(count)]
    pairs.write_photographs(0, [(image, None) for image in images[:VIEWS_PER_FILE]])
    pairs.write_photographs(VIEWS_PER_FILE, [(image, None) for image in images[VIEWS_PER_FILE:]])
    assert [int(pairs.photograph(i)[0].unique()) for i in range(count)] == list(range(count))
    assert len(list(tmp_path.iterdir())) == 2 and not pairs.missing_files()


def test_scenes_without_pairs_yet_are_left_out(tmp_path, source, vae):
    pairs = write_pairs(tmp_path / "done", source)
    replace(pairs, folder=tmp_path / "begun", latents={}).save()
    assert [scene.folder.name for scene in read_pairs(tmp_path, vae)] == ["done"]
    with pytest.raises(UserError, match=r"no pairs in .* \(--pairs\)"):
        read_pairs(tmp_path / "elsewhere", vae)


def test_pairs_of_another_latent_space_are_refused(tmp_path, source):
    write_pairs(tmp_path / "pairs" / "scene", source)
    other = VAEConfig(write_kl(tmp_path / "kl")).setup()
    with pytest.raises(UserError, match=rf"built with the VAE '{source}'.*not those of '{other.source}' \(--vae\)"):
        read_pairs(tmp_path / "pairs", other)


@pytest.mark.parametrize("file", ["latents-0000050.safetensors", "photographs-0000.safetensors"])
def test_a_missing_file_is_named(tmp_path, source, vae, file):
    write_pairs(tmp_path / "scene", source)
    (tmp_path / "scene" / file).unlink()
    with pytest.raises(UserError, match=f"index.json names {file}, which is missing"):
        read_pairs(tmp_path, vae)


def test_damaged_files_are_named(tmp_path, source, vae):
    pairs = write_pairs(tmp_path / "scene", source)
    shard = tmp_path / "scene" / pairs.latents[50]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{shard} cannot be read"):
        pairs.latent(0, 50)
    index = tmp_path / "scene" / INDEX
    content = json.loads(index.read_text())
    for damaged in ("{", "[]", json.dumps({**content, "format": "x"}), json.dumps({**content, "views": [{}]})):
        index.write_text(damaged)
        with pytest.raises(UserError, match=str(index)):
            read_pairs(tmp_path, vae)


def test_options_that_differ_are_named(tmp_path, source):
    pairs = write_pairs(tmp_path / "scene", source)
    check_options(pairs, {"steps": 100, "scene": "/data/scene", "VAE fingerprint": pairs.vae_fingerprint})
    with pytest.raises(UserError, match="their steps is 100, not 200"):
        check_options(pairs, {"steps": 200})


def test_a_full_disk_leaves_the_index_as_it_was(tmp_path, source):
    pairs = write_pairs(tmp_path / "scene", source)
    before = {file.name: file.read_bytes() for file in (tmp_path / "scene").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"latents-0000200.safetensors could not be written: File too large"):
            pairs.write_latents(200, [torch.rand(3, 23, 30)] * 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {file.name: file.read_bytes() for file in (tmp_path / "scene").iterdir()} == before
    assert 200 not in ScenePairs.load(tmp_path / "scene").latents


# ---------------------------------------------------------------------------------------------------- crops


def test_crops_are_the_photograph_and_the_latent_of_one_place(tmp_path, source):
    """Photographs and latents say where they are from: red and channel 0 the row, green and channel 1 the column."""
    views = (PairView("a", "train", 90, 119, mask=True), PairView("b", "novel", 90, 119, mask=True))
    pairs = ScenePairs(tmp_path, "scene", source, "f", 4, {}, [0.0] * 2, [1.0] * 2, views)
    rows, columns = torch.meshgrid(torch.arange(90), torch.arange(119), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)], dim=-1) / 255
    mask = columns != 60
    pairs.write_photographs(0, [(image, mask), (image, mask)])
    grid = torch.stack(torch.meshgrid(torch.arange(23.0), torch.arange(30.0), indexing="ij"))
    pairs.write_latents(10, [grid, grid])
    dataset = LatentCrops([pairs], cells=8, margin=3)
    first_cells, places = set(), set()
    for index in range(200):
        item = dataset[index]
        assert item["latent"].shape == (2, 14, 14) and item["image"].shape == (32, 32, 3)
        assert bool(item["novel"]) == bool(index % 2)
        row, column = item["place"].tolist()
        cells = item["latent"][:, row : row + 8, column : column + 8]
        enlarged = cells.repeat_interleave(4, 1).repeat_interleave(4, 2).permute(1, 2, 0)
        pixels = (255 * item["image"][..., :2]).round()
        inside = (pixels // 4 == enlarged).all(dim=-1)
        top, left = (4 * cells[:, 0, 0]).int().tolist()
        expected = (torch.arange(32)[:, None] + top < 90) & (torch.arange(32) + left < 119)
        expected &= torch.arange(32) + left != 60
        assert torch.equal(item["counts"], expected)
        assert inside[item["counts"]].all()
        first_cells.add((top // 4, left // 4))
        places.add((row, column))
    assert min(first_cells)[0] == 0 and max(first_cells)[0] == 15  # of 23 - 8
    assert {place for place in places if 0 not in place} >= {(3, 3)}  # in the middle there is a margin all round
    assert any(row == 0 for row, _ in places) and any(row == 6 for row, _ in places)  # at the edges on one side


def test_clean_items_show_one_recolored_place(tmp_path, source):
    """What counts and what surrounds it are mirrored together, and only clean items are recolored."""
    views = (PairView("a", "train", 92, 120, mask=True), PairView("b", "novel", 92, 120, mask=True))
    pairs = ScenePairs(tmp_path, "scene", source, "f", 4, {}, [0.0] * 2, [1.0] * 2, views)
    rows, columns = torch.meshgrid(torch.arange(92), torch.arange(120), indexing="ij")
    mask = (rows // 4 + columns // 4) % 3 == 0
    image = torch.where(mask, 0.8, 0.1)[..., None].expand(-1, -1, 3)
    pairs.write_photographs(0, [(image, mask), (image, mask)])
    pairs.write_latents(10, [torch.zeros(2, 23, 30)] * 2)
    dataset, places = LatentCrops([pairs], cells=8, margin=3, clean_share=0.5), set()
    for index in range(60):
        item = dataset[index]
        top, left = (4 * item["place"]).tolist()
        assert torch.equal(item["surroundings"][top : top + 32, left : left + 32], item["image"])
        bright, dark = item["image"][item["counts"]], item["image"][~item["counts"]]
        assert (bright.amin(dim=0) > dark.amax(dim=0)).all()
        is_original = torch.allclose(bright, torch.tensor(204 / 255))
        assert is_original == (not item["clean"])
        places.add((bool(item["clean"]), left))
    assert {left for clean, left in places if clean} >= {0, 12, 24}
    assert "clean" not in LatentCrops([pairs], cells=8, margin=3)[0]


def test_every_pair_of_a_kind_comes_up_equally_often(tmp_path, source):
    scenes = [
        write_pairs(tmp_path / "few", source, "nt"),
        write_pairs(tmp_path / "many", source, "nttt"),
    ]
    dataset = LatentCrops(scenes, cells=8, margin=0)
    counts: dict[tuple[str, int, int], int] = {}
    for number in range(int(dataset._first_pair["train"][-1])):
        scene, view, steps = dataset._pair("train", number)
        counts[scene.folder.name, view, steps] = counts.get((scene.folder.name, view, steps), 0) + 1
    expected = {
        (scene, view, steps) for steps in STEPS for scene, view in (("few", 1), ("many", 1), ("many", 2), ("many", 3))
    }
    assert counts == dict.fromkeys(expected, 1)


def test_an_item_depends_on_its_number_and_the_seed_alone(tmp_path, source):
    pairs = write_pairs(tmp_path, source)
    one, other = (LatentCrops([pairs], cells=8, margin=1, seed=3) for _ in range(2))
    for index in (0, 7, 2):
        other[index + 1]
        for name, value in one[index].items():
            torch.testing.assert_close(other[index][name], value, rtol=0, atol=0)
    assert not torch.equal(LatentCrops([pairs], cells=8, margin=1, seed=4)[0]["latent"], one[0]["latent"])


@pytest.mark.parametrize(("kinds", "missing"), [("ttt", "novel"), ("nn", "train")])
def test_both_kinds_are_needed(tmp_path, source, kinds, missing):
    with pytest.raises(UserError, match=f"no {missing} views"):
        LatentCrops([write_pairs(tmp_path, source, kinds)], cells=8, margin=1)


def test_a_picture_smaller_than_a_crop_is_named(tmp_path, source):
    pairs = write_pairs(tmp_path, source)
    LatentCrops([pairs], cells=21, margin=1)
    with pytest.raises(UserError, match=r"0\.png of .* is 119 x 90 pixels, smaller than a crop with its margin, 96"):
        LatentCrops([pairs], cells=20, margin=2)


def test_decoding_with_enough_margin_is_decoding_the_whole_picture(tmp_path, source, vae):
    pairs = write_pairs(tmp_path, source)
    dataset = LatentCrops([pairs], cells=8, margin=7)
    with torch.no_grad():
        for index in range(6):
            item = dataset[index]
            latent, place = item["latent"][None], item["place"][None]
            decoded = cut(vae.decode(latent, 88, 88), place, 8, 4)[0]
            pairs_of_kind = [pairs.latent(view, steps) for view in range(6) for steps in STEPS]
            (whole,) = [z for z in pairs_of_kind if _contains(z, item["latent"])]
            top, left = _contains(whole, item["latent"])[0]
            row, column = 4 * (top + int(place[0, 0])), 4 * (left + int(place[0, 1]))
            expected = vae.decode(whole[None], 92, 120)[0, row : row + 32, column : column + 32]
            torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)


def test_parts_are_cut_where_slices_are(tmp_path):
    pictures = torch.rand(3, 40, 40, 3, requires_grad=True)
    places = torch.tensor([[0, 0], [2, 1], [1, 2]])
    expected = torch.stack(
        [p[4 * r : 4 * r + 32, 4 * c : 4 * c + 32] for p, (r, c) in zip(pictures, places.tolist(), strict=True)]
    )
    parts = cut(pictures, places, 8, 4)
    assert torch.equal(parts, expected)
    weights = torch.rand_like(parts)
    gradients = [torch.autograd.grad((part * weights).sum(), pictures)[0] for part in (parts, expected)]
    assert torch.equal(*gradients)


def _contains(whole: torch.Tensor, part: torch.Tensor) -> list[tuple[int, int]]:
    """Where a latent contains another one."""
    height, width = part.shape[1:]
    return [
        (row, column)
        for row in range(whole.shape[1] - height + 1)
        for column in range(whole.shape[2] - width + 1)
        if torch.equal(whole[:, row : row + height, column : column + width], part)
    ]
