import cv2
import numpy as np
import pytest
from PIL import Image

from lrf_nerfstudio.correspondence.features import (
    Features,
    common_features,
    detect_features,
    match_descriptors,
)
from lrf_nerfstudio.utils.errors import UserError


def texture(height, width, seed=0):
    """Blobs of all sizes, as photographs have them, [H, W] uint8."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width), np.float32)
    for size in (4, 8, 16, 32):
        coarse = rng.normal(size=(height // size + 3, width // size + 3)).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * size**0.5
    image = 128 + 45 * image / image.std()
    return image.clip(0, 255).astype(np.uint8)


def save(image, path):
    Image.fromarray(image).save(path)
    return path


def matched(path_i, path_j, ratio=0.8):
    features = [detect_features(path, 2000) for path in (path_i, path_j)]
    rows = match_descriptors(features[0].root_descriptors(), features[1].root_descriptors(), ratio)
    return features[0].points[rows[:, 0]], features[1].points[rows[:, 1]]


def test_matches_of_a_warped_image_are_where_the_homography_says(tmp_path):
    image = texture(300, 400)
    homography = np.array([[0.9, 0.25, 20.0], [-0.2, 1.0, 60.0], [1e-4, -2e-4, 1.0]])
    # OpenCV warps in coordinates whose 0 is the first pixel's centre; the files' 0 is its corner.
    warped = cv2.warpPerspective(image, homography, (400, 300), flags=cv2.INTER_CUBIC)
    in_image, in_warped = matched(save(image, tmp_path / "a.png"), save(warped, tmp_path / "b.png"))
    expected = cv2.perspectiveTransform(in_image[None] - 0.5, homography)[0] + 0.5
    errors = np.linalg.norm(in_warped - expected, axis=1)
    assert len(errors) > 200
    assert np.median(errors) < 0.25
    assert (errors < 1).mean() > 0.97
    assert np.abs(np.median(in_warped - expected, axis=0)).max() < 0.03


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_pixels_count_from_the_corner_of_the_image(tmp_path, scale):
    # Resizing keeps the corners where they are: points scale with the image, and half a pixel would show.
    image = texture(300, 400)
    size = (int(400 * scale), int(300 * scale))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    in_image, in_resized = matched(save(image, tmp_path / "a.png"), save(resized, tmp_path / "b.png"))
    assert len(in_image) > 50
    assert np.abs(np.median(in_resized - scale * in_image, axis=0)).max() < 0.06
    blob = np.zeros((41, 61), np.float32)
    blob[20, 30] = 1  # the centre of this pixel is at (30.5, 20.5)
    blob = (cv2.GaussianBlur(blob, (0, 0), 3) * 5000).clip(0, 255).astype(np.uint8)
    features = detect_features(save(blob, tmp_path / "blob.png"), 10)
    assert np.abs(features.points - (30.5, 20.5)).max(axis=1).min() < 0.05


def test_features_are_the_same_every_time_and_the_largest_come_first(tmp_path):
    path = save(texture(200, 200), tmp_path / "a.png")
    first, second = detect_features(path, 150), detect_features(path, 150)
    assert (first.points == second.points).all() and (first.descriptors == second.descriptors).all()
    assert first.points.shape == (len(first.descriptors), 2) and 100 <= len(first.points) <= 160
    keypoints = cv2.SIFT.create(10_000, enable_precise_upscale=True).detect(texture(200, 200))
    sizes = {(k.pt[0] + 0.5, k.pt[1] + 0.5): k.size for k in keypoints}
    found = [sizes[(float(x), float(y))] for x, y in first.points if (float(x), float(y)) in sizes]
    assert len(found) > 50 and found == sorted(found, reverse=True)


def test_an_image_is_taken_as_it_lies_on_disk(tmp_path):
    image = Image.fromarray(texture(120, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees when shown
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.save(tmp_path / "plain.jpg", quality=95)
    turned, plain = (detect_features(tmp_path / name, 500) for name in ("turned.jpg", "plain.jpg"))
    assert (turned.points == plain.points).all()
    assert turned.points[:, 0].max() > 120


def test_an_image_without_features_and_one_that_is_cut_off(tmp_path):
    gray = save(np.full((50, 60), 128, np.uint8), tmp_path / "gray.png")
    features = detect_features(gray, 100)
    assert features.points.shape == (0, 2) and features.root_descriptors().shape == (0, 128)
    other = detect_features(save(texture(100, 100), tmp_path / "a.png"), 100)
    assert match_descriptors(features.root_descriptors(), other.root_descriptors(), 0.8).shape == (0, 2)
    assert match_descriptors(other.root_descriptors(), features.root_descriptors(), 0.8).shape == (0, 2)
    path = save(texture(100, 100), tmp_path / "cut.png")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"cut.png cannot be read"):
        detect_features(path, 100)


def directions(*degrees):
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1).astype(np.float32)


def test_matches_are_mutual_nearest_neighbours():
    # 0 and 3 degrees are both nearest to 2, which is nearer to 3.
    assert match_descriptors(directions(0, 3, 90), directions(2, 92), 1.0).tolist() == [[1, 0], [2, 1]]
    assert match_descriptors(directions(2, 92), directions(0, 3, 90), 1.0).tolist() == [[0, 1], [1, 2]]


def test_a_match_is_clearly_nearer_than_the_next_from_both_sides():
    # Of 0: the nearest is 2 away, the next 3 (ratio 0.667).
    assert match_descriptors(directions(0), directions(2, 3), 0.66).tolist() == []
    assert match_descriptors(directions(0), directions(2, 3), 0.68).tolist() == [[0, 0]]
    assert match_descriptors(directions(2, 3), directions(0), 0.66).tolist() == []
    assert match_descriptors(directions(2, 3), directions(0), 0.68).tolist() == [[0, 0]]
    twins = directions(10, 10, 50)
    assert match_descriptors(twins, directions(11, 52), 1.0).tolist() == [[2, 1]]
    assert match_descriptors(directions(11, 52), twins, 1.0).tolist() == [[1, 2]]


def test_matching_agrees_with_opencv(tmp_path):
    image = texture(200, 260)
    other = np.roll(image, (3, 7), (0, 1))
    a, b = (detect_features(save(i, tmp_path / f"{n}.png"), 600) for n, i in enumerate((image, other)))
    a, b = a.root_descriptors(), b.root_descriptors()
    ratio = 0.8
    forward = cv2.BFMatcher(cv2.NORM_L2).knnMatch(a, b, 2)
    backward = cv2.BFMatcher(cv2.NORM_L2).knnMatch(b, a, 2)
    clear_i = {(m.queryIdx, m.trainIdx) for m, n in forward if m.distance < ratio * n.distance}
    clear_j = {(m.trainIdx, m.queryIdx) for m, n in backward if m.distance < ratio * n.distance}
    ours = {tuple(row) for row in match_descriptors(a, b, ratio).tolist()}
    assert len(ours) > 100
    assert len(ours ^ (clear_i & clear_j)) <= 2  # ties and rounding at distance 0


def test_root_descriptors_are_the_roots_of_histograms_that_sum_to_one():
    descriptors = np.zeros((3, 128), np.uint8)
    descriptors[0, :2] = (9, 16)
    descriptors[1] = 255
    roots = Features(np.zeros((3, 2), np.float32), descriptors).root_descriptors()
    assert roots[0, :3] == pytest.approx([0.6, 0.8, 0])
    assert roots[1] == pytest.approx(np.full(128, 128**-0.5))
    assert (roots[2] == 0).all()
    assert Features(np.zeros((3, 2), np.float32), descriptors).root_descriptors(1).shape == (1, 128)


def test_photographs_of_one_place_have_features_in_common(tmp_path):
    # Two places, three photographs of each, in no order.
    places = [texture(240, 320, seed) for seed in (1, 2)]
    photographs = [np.roll(places[n % 2], (5 * n, 9 * n), (0, 1)) for n in range(6)]
    features = [detect_features(save(p, tmp_path / f"{n}.png"), 500) for n, p in enumerate(photographs)]
    counts = common_features(features, 0.8)
    assert (counts == counts.T).all() and (np.diag(counts) == 0).all()
    same_place = np.arange(6)[:, None] % 2 == np.arange(6) % 2
    assert counts[same_place & ~np.eye(6, dtype=bool)].min() > 10 * (1 + counts[~same_place].max())
