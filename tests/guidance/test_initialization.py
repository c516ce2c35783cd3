"""The first Gaussians of text-to-3D."""

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement

from lrf_nerfstudio.guidance import InitializationConfig, initial_gaussians, load_points
from lrf_nerfstudio.utils.errors import UserError


def write_ply(path, points, text=False):
    vertices = np.array([tuple(point) for point in points], dtype=[(axis, "f4") for axis in "xyz"])
    PlyData([PlyElement.describe(vertices, "vertex")], text=text).write(path)
    return path


def test_a_ball_is_filled_evenly():
    config = InitializationConfig(count=4000, radius=0.5, opacity=0.2)
    gaussians = initial_gaussians(config, channels=4)
    distances = gaussians["means"].norm(dim=-1)
    assert distances.max() <= 0.5
    # Half of a ball's volume lies within 0.5^(1/3) of its radius.
    assert (distances < 0.5 * 0.5 ** (1 / 3)).float().mean() == pytest.approx(0.5, abs=0.03)
    assert gaussians["means"].mean(dim=0).abs().max() < 0.02
    torch.testing.assert_close(torch.sigmoid(gaussians["opacities"]), torch.full((4000, 1), 0.2))
    assert gaussians["features_dc"].shape == (4000, 4)
    assert gaussians["features_rest"].shape == (4000, 0, 4)
    assert (gaussians["features_dc"] * 0.28209479177387814).std() == pytest.approx(0.1, rel=0.05)


def test_it_depends_on_its_seed_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = initial_gaussians(InitializationConfig(count=50), 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = initial_gaussians(InitializationConfig(count=50), 4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = initial_gaussians(InitializationConfig(count=50, seed=1), 4)
    assert not any(torch.equal(first[name], third[name]) for name in ("means", "quats", "features_dc"))


@pytest.mark.parametrize("kind", ["binary ply", "text ply", "points", "coords"])
def test_points_of_a_file(tmp_path, kind):
    points = np.random.default_rng(0).uniform(2.0, 5.0, (20, 3)).astype(np.float32)
    if kind.endswith("ply"):
        path = write_ply(tmp_path / "points.ply", points, text=kind.startswith("text"))
    else:
        path = tmp_path / "points.npz"
        np.savez(path, **{kind: points, "R": np.zeros(20)})
    torch.testing.assert_close(load_points(path), torch.from_numpy(points))
    kept = initial_gaussians(InitializationConfig(points=path, keep_coordinates=True), 4)
    torch.testing.assert_close(kept["means"], torch.from_numpy(points))
    fitted = initial_gaussians(InitializationConfig(points=path, radius=0.4), 4)["means"]
    torch.testing.assert_close(fitted.amin(dim=0), -fitted.amax(dim=0), atol=1e-6, rtol=1e-5)
    assert fitted.norm(dim=-1).max() == pytest.approx(0.4)
    scale = (fitted[1] - fitted[0]).norm() / np.linalg.norm(points[1] - points[0])
    torch.testing.assert_close(fitted - fitted[0], scale * torch.from_numpy(points - points[0]), atol=1e-5, rtol=1e-4)


def no_vertices(path):
    faces = np.array([([0, 1, 2],)], dtype=[("vertex_indices", "i4", (3,))])
    PlyData([PlyElement.describe(faces, "face")]).write(path)


def no_z(path):
    PlyData([PlyElement.describe(np.zeros(5, dtype=[("x", "f4"), ("y", "f4")]), "vertex")]).write(path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.ply", lambda path: None, "cannot be read: No such file"),
        ("a.ply", lambda path: path.write_bytes(b"nonsense"), "holds no points"),
        ("a.ply", no_vertices, "it has no vertices"),
        ("a.ply", no_z, "z"),
        ("a.ply", lambda path: write_ply(path, np.zeros((0, 3))), "at least 4 points"),
        ("a.ply", lambda path: write_ply(path, np.full((9, 3), np.nan)), "NaN"),
        ("a.npz", lambda path: path.write_bytes(b"nonsense"), "holds no points"),
        ("a.npz", lambda path: np.savez(path, colors=np.zeros((9, 3))), "its arrays are colors"),
        ("a.npz", lambda path: np.savez(path, points=np.array([{}] * 9, dtype=object)), "holds no points"),
        ("a.npz", lambda path: np.savez(path, points=np.zeros((9, 2))), r"shape \(9, 2\)"),
        ("a.obj", lambda path: path.write_text("v 0 0 0"), "must be a .ply or .npz"),
    ],
)
def test_files_without_points_are_refused(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(UserError, match=message) as error:
        load_points(path)
    assert str(path) in str(error.value)
    assert "initialization.points" in str(error.value)
