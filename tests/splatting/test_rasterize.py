"""The rasterizer's CPU backend against the dense float64 reference, and its promises."""

import doctest
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian_scenes import arguments, random_scene

from lrf_nerfstudio.splatting import RasterSettings, rasterization, rasterize
from lrf_nerfstudio.splatting.cpu import threads
from lrf_nerfstudio.splatting.reference import blend_reference, rasterize_reference

WIDTH, HEIGHT = 23, 17


def run(function, scene, dtype, seed=3, **options):
    """Outputs of a rasterizer and the gradients of a random linear function of them."""
    leaves = {name: tensor.to(dtype, copy=True).requires_grad_(name != "Ks") for name, tensor in scene.items()}
    outputs = function(*arguments(leaves), RasterSettings(WIDTH, HEIGHT, **options))
    generator = torch.Generator().manual_seed(seed)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(dtype)).sum() for out in outputs[:3])
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in leaves.items() if name != "Ks"}
    return [out.detach() for out in outputs[:3]], gradients, outputs[3:]


def assert_close(actual, expected, tolerance, what):
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert error < tolerance, f"{what}: relative error {error:.1e}"


CASES = {
    "plain features": ({}, {}),
    "one channel, dense": ({"n": 700, "channels": 1, "opacity": 0.6}, {}),
    "opaque": ({"n": 400, "channels": 3, "opacity": 1.0}, {}),
    "harmonics 0": ({"sh_degree": 0, "channels": 3}, {"sh_degree": 0}),
    "harmonics 1, two cameras": ({"sh_degree": 1, "channels": 17, "n_cameras": 2}, {"sh_degree": 1}),
    "harmonics 2, antialiased": ({"sh_degree": 2, "channels": 5}, {"sh_degree": 2, "antialiased": True}),
    "harmonics 3": ({"sh_degree": 3}, {"sh_degree": 3}),
    "degree 1 of 3, 16 channels": ({"sh_degree": 3, "channels": 16}, {"sh_degree": 1}),
    "32 channels, planes": ({"channels": 32}, {"near_plane": 2.0, "far_plane": 4.0}),
    "other dilation": ({"channels": 2}, {"eps2d": 0.05, "antialiased": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_dense_reference(case):
    of_scene, options = CASES[case]
    scene = random_scene(width=WIDTH, height=HEIGHT, **of_scene)
    outputs, gradients, _ = run(rasterize, scene, torch.float32, **options)
    expected_outputs, expected_gradients, _ = run(rasterize_reference, scene, torch.float64, **options)
    for name, actual, expected in zip(("features", "depth", "alpha"), outputs, expected_outputs, strict=True):
        assert_close(actual, expected, 1e-5, name)
    for name, expected in expected_gradients.items():
        assert expected.abs().max() > 0, f"the case says nothing about {name}"
        assert_close(gradients[name], expected, 3e-5, f"gradient of {name}")


def test_reference_gradients_equal_finite_differences():
    scene = random_scene(n=12, channels=2, width=WIDTH, height=HEIGHT, sh_degree=2, seed=5)
    _, gradients, _ = run(rasterize_reference, scene, torch.float64, sh_degree=2, antialiased=True)
    generator = torch.Generator().manual_seed(0)
    for name, gradient in gradients.items():
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        if name == "viewmats":
            direction[:, 3] = 0  # the last row of a pose is not a parameter
        values = []
        for step in (-1e-6, 1e-6):
            moved = scene | {name: scene[name] + step * direction}
            outputs, _, _ = run(rasterize_reference, moved, torch.float64, sh_degree=2, antialiased=True)
            weights = torch.Generator().manual_seed(3)
            values.append(sum((out * torch.randn(out.shape, generator=weights).double()).sum() for out in outputs))
        slope = (values[1] - values[0]) / 2e-6
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-5, atol=1e-6, msg=name)


def test_means2d_gradients_and_their_absolute_sum():
    """means2d.grad is the gradient of the 2D centers; absgrad sums absolute values over pixels, so it bounds it."""
    scene = random_scene(n=60, width=WIDTH, height=HEIGHT)
    leaves = {name: tensor.float().requires_grad_() for name, tensor in scene.items() if name != "Ks"}
    image, _, _, info = rasterize(
        *arguments(leaves | {"Ks": scene["Ks"].float()}), RasterSettings(WIDTH, HEIGHT, absgrad=True)
    )
    info["means2d"].retain_grad()
    weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    (image * weights).sum().backward()
    gradient, absolute = info["means2d"].grad, info["means2d"].absgrad
    assert gradient.shape == absolute.shape == (1, 60, 2)
    assert (absolute >= gradient.abs() - 1e-5).all()

    seen = info["radii"][0] > 0
    inputs = [info[key][0, seen].detach().double() for key in ("means2d", "conics", "opacities")]
    others = (*inputs[1:], scene["features"][seen], info["depths"][0, seen].double(), WIDTH, HEIGHT)
    per_pixel = torch.autograd.functional.jacobian(
        lambda means2d: (blend_reference(means2d, *others)[0] * weights[0]).sum(-1), inputs[0]
    )  # [H, W, V, 2]
    assert_close(gradient[0, seen], per_pixel.sum((0, 1)), 3e-5, "gradient")
    assert_close(absolute[0, seen], per_pixel.abs().sum((0, 1)), 3e-5, "absolute gradient")


def test_runs_are_identical_bit_for_bit_with_any_number_of_threads(monkeypatch):
    scene = random_scene(n=9000, channels=4, width=WIDTH, height=HEIGHT, sh_degree=3, n_cameras=2)
    results = []
    for number in (1, 2, 3, 2):
        monkeypatch.setattr(threads, "thread_count", lambda number=number: number)
        results.append(run(rasterize, scene, torch.float32, sh_degree=3, absgrad=True))
    for outputs, gradients, _ in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, results[0][0], strict=True))
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


@pytest.mark.parametrize(
    ("n", "width", "height", "channels"), [(0, 5, 3, 4), (20, 1, 1, 1), (200, 33, 7, 32), (5, 300, 2, 2), (60, 4, 9, 7)]
)
def test_any_size_works(n, width, height, channels):
    scene = random_scene(n=n, channels=channels, width=width, height=height)
    leaves = {name: tensor.float().requires_grad_(name != "Ks") for name, tensor in scene.items()}
    image, depth, alpha, _ = rasterize(*arguments(leaves), RasterSettings(width, height))
    assert image.shape == (1, height, width, channels)
    assert depth.shape == alpha.shape == (1, height, width, 1)
    (image.sum() + depth.sum() + alpha.sum()).backward()
    expected = rasterize_reference(*arguments(scene), RasterSettings(width, height))
    torch.testing.assert_close(image.double(), expected[0], rtol=1e-4, atol=1e-5)


def test_nothing_visible_gives_zeros_and_zero_gradients():
    scene = random_scene(n=30, width=WIDTH, height=HEIGHT)
    scene["means"] -= 100 * scene["viewmats"][0, 2, :3]  # behind the camera
    (image, depth, alpha), gradients, (info,) = run(rasterize, scene, torch.float32)
    assert (image == 0).all() and (depth == 0).all() and (alpha == 0).all()
    assert (info["radii"] == 0).all()
    assert all((gradients[name] == 0).all() for name in ("means", "quats", "scales", "opacities", "features"))


def test_gaussians_that_are_not_finite_are_invisible():
    scene = random_scene(n=80, width=WIDTH, height=HEIGHT)
    outputs, _, _ = run(rasterize, {k: v[10:] if len(v) == 80 else v for k, v in scene.items()}, torch.float32)
    broken = {name: tensor.clone() for name, tensor in scene.items()}
    broken["means"][0] = float("nan")
    broken["means"][1, 2] = float("inf")
    broken["means"][2] = -float("inf")
    broken["scales"][3, 0] = float("inf")
    broken["scales"][4] = float("nan")
    broken["scales"][5] = 1e30
    broken["quats"][6] = 0
    broken["quats"][7, 1] = float("nan")
    broken["opacities"][8] = float("nan")
    broken["features"][9, 0] = float("inf")
    broken_outputs, gradients, _ = run(rasterize, broken, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(outputs, broken_outputs, strict=True))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_depth_is_optional_and_plays_no_part_in_features():
    scene = {name: tensor.float() for name, tensor in random_scene(width=WIDTH, height=HEIGHT).items()}
    with_depth = rasterize(*arguments(scene), RasterSettings(WIDTH, HEIGHT))
    without = rasterize(*arguments(scene), RasterSettings(WIDTH, HEIGHT, render_depth=False))
    assert without[1] is None
    assert torch.equal(with_depth[0], without[0]) and torch.equal(with_depth[2], without[2])


def test_wrong_arguments_are_named_with_their_shape():
    scene = {name: tensor.float() for name, tensor in random_scene(n=7).items()}
    for name, wrong, message in [
        ("quats", torch.zeros(7, 3), r"quats .*\(7, 3\)"),
        ("features", torch.zeros(6, 4), r"features .*\(6, 4\)"),
        ("viewmats", torch.zeros(1, 3, 4), r"viewmats .*\(1, 3, 4\)"),
        ("opacities", torch.zeros(7, 1), r"opacities .*\(7, 1\)"),
        ("means", torch.zeros(7, 3).double(), "means must be float32"),
    ]:
        with pytest.raises(AssertionError, match=message):
            rasterize(*arguments(scene | {name: wrong}), RasterSettings(8, 8))
    for degree, rest, message in [
        (1, None, r"features_rest .*K >= 4: \(7, 0, 4\)"),
        (2, torch.zeros(7, 3, 4), r"features_rest .*K >= 9: \(7, 3, 4\)"),
        (1, torch.zeros(7, 3, 5), r"features_rest .*C = 4: \(7, 3, 5\)"),
        (4, torch.zeros(7, 24, 4), "sh_degree must be 0 to 3"),
    ]:
        with pytest.raises(AssertionError, match=message):
            rasterize(*arguments(scene | {"features_rest": rest}), RasterSettings(8, 8, sh_degree=degree))


def test_two_python_threads_may_rasterize_at_once():
    """A viewer renders while a trainer trains; numba's own threading layer aborts the process then."""
    scene = random_scene(n=2000, width=WIDTH, height=HEIGHT, sh_degree=2)
    expected = run(rasterize, scene, torch.float32, sh_degree=2)
    results, failures = [], []

    def work():
        try:
            results.extend(run(rasterize, scene, torch.float32, sh_degree=2) for _ in range(15))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    for outputs, gradients, _ in results:
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected[0], strict=True))
        assert all(torch.equal(gradients[name], expected[1][name]) for name in gradients)


def test_importing_the_package_imports_neither_numba_nor_gsplat():
    code = "import sys, lrf_nerfstudio.splatting; print(sorted({'numba', 'gsplat', 'llvmlite'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_a_forked_process_can_rasterize():
    """A child has none of its parent's threads, so it must not wait for them."""
    code = """
import multiprocessing, sys, torch
sys.path.insert(0, sys.argv[1])
from gaussian_scenes import arguments, random_scene
from lrf_nerfstudio.splatting import RasterSettings, rasterize
from lrf_nerfstudio.splatting.cpu import threads
torch.set_num_threads(2)
scene = {name: tensor.float() for name, tensor in random_scene(n=5000).items()}
def total():
    return rasterize(*arguments(scene), RasterSettings(40, 40)).features.sum().item()
expected = total()
with multiprocessing.get_context("fork").Pool(1) as pool:
    assert pool.apply_async(total).get(timeout=60) == expected
"""
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parents[1] / "helpers")], check=True, timeout=120)


def test_kernels_compile_where_no_cache_can_be_kept():
    """Numba then refuses to cache (here since there is no source file), and the kernel works without."""
    namespace = {}
    exec("def double(begin, end, x):\n    for i in range(begin, end):\n        x[i] *= 2\n", namespace)
    numbers = np.arange(4.0)
    threads.run(threads.kernel(namespace["double"]), [(0, 2), (2, 4)], numbers)
    assert numbers.tolist() == [0, 2, 4, 6]


def test_the_docstrings_examples_run():
    assert doctest.testmod(rasterization).attempted > 0 == doctest.testmod(rasterization).failed
