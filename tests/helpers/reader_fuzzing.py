"""Mutates the files that readers read; a reader gives a correct result or one clear error, and nothing else happens.

Mutations run in processes of their own, so that a crash or a hang of a library counts as a failure and ends nothing.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
"""Seconds after which a reader has hung."""
MEMORY = 4 << 30
"""Bytes of address space that a reader may take more than its process has before."""
FEATURES = 4
"""Channels of the field and of the autoencoders."""


@dataclass
class FuzzReaders:
    """Mutates the files that readers read; each mutation must end in a correct result or a clear error."""

    mutations: int = 10_000
    """How many, shared by the readers."""
    seed: int = 0
    """Of the mutations."""
    readers: tuple[str, ...] = ()
    """Names of the readers; all where none is named."""
    keep: Path | None = None
    """Folder for the files of the mutations that failed."""
    report: Path | None = None
    """File for the figures, as JSON."""


@dataclass
class Outcome:
    """What became of the mutations of a reader.

    Attributes:
        read: gave a result that could be used.
        refused: ended in a clear error.
        failures: what else happened, with the numbers of the mutations.
    """

    read: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        write: writes a good set of files into a folder, which need not exist.
        mutated: patterns of the files that are mutated, in the folder.
        read: reads them and uses what it has read; raises AssertionError where the result is none.
    """

    write: Callable[[Path], object]
    mutated: tuple[str, ...]
    read: Callable[[Path], object]


# ---------------------------------------------------------------------------------------------------- readers


def _write_field(folder: Path, with_decoder: bool = True) -> None:
    import torch

    from lrf_nerfstudio.field import LatentField
    from lrf_nerfstudio.field.decoder import SceneDecoder
    from lrf_nerfstudio.vae import FieldNormalization, LinearRGB

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    count, factor = 12, 8
    decoder = SceneDecoder(channels=FEATURES, factor=factor, cell=4, width=4, blocks=1) if with_decoder else None
    LatentField(
        means=normal(count, 3),
        quats=normal(count, 4),
        scales=normal(count, 3).exp() / 5,
        opacities=torch.rand(count, generator=generator),
        features=normal(count, 4, FEATURES),
        background=normal(FEATURES),
        normalization=FieldNormalization(FEATURES),
        linear_rgb=LinearRGB(FEATURES),
        spatial_factor=factor,
        dilation=0.1,
        antialiased=False,
        vae_source="tiny",
        vae_fingerprint="0" * 64,
        scene_transform=torch.eye(4)[:3],
        scene_scale=1.0,
        decoder=decoder,
    ).save(folder / "field.safetensors")


def _read_field(folder: Path) -> None:
    import torch

    from lrf_nerfstudio.field import LatentField

    loaded = LatentField.load(folder / "field.safetensors")
    viewmat = torch.eye(4)
    viewmat[2, 3] = 4.0
    K = torch.tensor([[20.0, 0.0, 10.0], [0.0, 20.0, 8.5], [0.0, 0.0, 1.0]])
    if loaded.spatial_factor > 64:
        return  # a picture of one cell, of any size
    latent = loaded.render(viewmat, K, 20, 17)
    cells = [math.ceil(length / loaded.spatial_factor) for length in (17, 20)]
    assert latent.shape == (loaded.features.shape[-1], *cells)
    if loaded.decoder is not None:
        assert loaded.picture(viewmat, K, 20, 17).shape == (17, 20, 3)


def _write_generic(folder: Path) -> None:
    from tiny_vaes import make_vae

    from lrf_nerfstudio.field.decoder import SceneDecoder
    from lrf_nerfstudio.field.generic_decoder import save_generic
    from lrf_nerfstudio.vae import VAEConfig

    vae = VAEConfig(str(make_vae(folder / "vae"))).setup()
    decoder = SceneDecoder(channels=vae.latent_channels, factor=vae.spatial_factor, cell=4, width=4, blocks=1)
    save_generic(decoder, vae, folder / "scene_decoder.safetensors")


def _read_generic(folder: Path) -> None:
    import torch

    from lrf_nerfstudio.field.generic_decoder import load_generic
    from lrf_nerfstudio.vae import VAEConfig

    decoder = load_generic(folder / "scene_decoder.safetensors", VAEConfig(str(folder / "vae")).setup())
    assert decoder.decode(torch.zeros(12, 16, 4), 20, 30).shape == (20, 30, 3)


def _write_ldm(folder: Path, suffix: str) -> None:
    import torch
    from latent_diffusion import ldm_layout
    from safetensors.torch import save_file
    from tiny_autoencoders import tiny_kl

    torch.manual_seed(0)
    levels = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2}
    weights = ldm_layout(tiny_kl(**levels, norm_num_groups=32, latent_channels=FEATURES, shift_factor=None))
    folder.mkdir(parents=True)
    if suffix == ".safetensors":
        save_file(weights, folder / "vae.safetensors")
    else:
        torch.save({"state_dict": weights, "epoch": 3, "callbacks": {"EMA": {"decay": 0.99}}}, folder / "vae.ckpt")


def _read_vae(source: Path) -> None:
    import torch

    from lrf_nerfstudio.vae import VAEConfig

    vae = VAEConfig(str(source)).setup()
    latents = vae.encode(torch.full((1, 16, 16, 3), 0.5))
    assert latents.shape[1] == vae.latent_channels
    assert vae.decode(latents, 16, 16).shape == (1, 16, 16, 3)


def _write_diffusers(folder: Path) -> None:
    from tiny_vaes import make_vae

    make_vae(folder)


def _write_colmap(folder: Path, text: bool) -> None:
    from colmap_scenes import known_scene, write_images, write_model

    scene = known_scene(views=4, points=12)
    write_images(scene, folder / "images")
    write_model(scene, folder / "colmap" / "sparse" / "0", text)


def _write_transforms(folder: Path) -> None:
    from tiny_scenes import Lens, write_scene

    lens = Lens(20, 16, 18.0, distortion={"k1": 0.05, "p1": 0.001})
    write_scene(folder, views=9, lenses=lens, masked=True)


def _read_scene(folder: Path) -> None:
    import numpy as np

    from lrf_nerfstudio.correspondence.scene import load_scene

    scene = load_scene(folder)
    assert scene.views and all(view.path.is_file() for view in scene.views)
    for view in scene.views:
        if view.camera is not None and view.cam_from_world is not None:
            assert (view.camera.width, view.camera.height) == (view.width, view.height)
            assert np.isfinite(view.camera.params).all() and np.isfinite(view.cam_from_world).all()
            view.camera.cam_from_img(np.array([[3.0, 4.0]]))


def _parse_scene(folder: Path) -> None:
    """Read a scene as ns-train does, photographs and masks too."""
    import torch

    from lrf_nerfstudio.plugin.dataparser import parse, scene_parser, setup_dataparser
    from lrf_nerfstudio.plugin.dataset import PinholeDataset

    parser = setup_dataparser(scene_parser(folder, None))
    outputs = parse(parser, folder, "train")
    assert outputs.cameras.camera_to_worlds.isfinite().all()
    points = outputs.metadata.get("points3D_xyz")
    assert points is None or (points.ndim == 2 and points.shape[1] == 3)
    dataset = PinholeDataset(outputs)
    dataset.check_sizes()
    image, mask = dataset.photograph(0)
    assert image.shape == (*dataset.size(0), 3) and image.isfinite().all()
    assert mask is None or (mask.shape == image.shape[:2] and mask.dtype == torch.bool)


def _write_points(folder: Path, suffix: str) -> None:
    import numpy as np
    from plyfile import PlyData, PlyElement

    points = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    folder.mkdir(parents=True)
    if suffix == ".npz":
        np.savez(folder / "points.npz", points=points, colors=points)
        return
    vertices = np.zeros(len(points), dtype=[(axis, "f4") for axis in "xyz"])
    for axis, column in zip("xyz", points.T, strict=True):
        vertices[axis] = column
    PlyData([PlyElement.describe(vertices, "vertex")], text=suffix == ".txt").write(str(folder / "points.ply"))


def _read_points(folder: Path) -> None:
    import torch

    from lrf_nerfstudio.guidance.initialization import load_points

    (file,) = folder.iterdir()
    points = load_points(file)
    assert points.ndim == 2 and points.shape[1] == 3 and len(points) >= 4 and points.isfinite().all()
    assert points.dtype == torch.float32


def _write_checkpoint(folder: Path) -> None:
    import torch

    folder.mkdir(parents=True)
    state = {"step": 3, "pipeline": {"_model.means": torch.rand(5, 3)}, "schedulers": {"means": {"last_epoch": 3}}}
    torch.save(state, folder / "step-000000003.ckpt")


def _read_checkpoint(folder: Path) -> None:
    from lrf_nerfstudio.plugin.trainer import load_checkpoint

    load_checkpoint(folder / "step-000000003.ckpt")


def _write_pairs(folder: Path) -> None:
    from tiny_pairs import write_pairs
    from tiny_vaes import make_vae

    write_pairs(folder / "scene", str(make_vae(folder / "vae")), "tn", size=(24, 30))


def _read_pairs(folder: Path) -> None:
    from lrf_nerfstudio.training.data.scene_pairs import read_pairs
    from lrf_nerfstudio.vae import VAEConfig

    for pairs in read_pairs(folder, VAEConfig(str(folder / "vae")).setup()):
        for view in range(len(pairs.views)):
            assert pairs.photograph(view)[0].ndim == 3
            for steps in pairs.latents:
                assert pairs.latent(view, steps).ndim == 3


MODEL = "colmap/sparse/0/*"
READERS: dict[str, Reader] = {
    "COLMAP model, binary": Reader(lambda folder: _write_colmap(folder, text=False), (MODEL,), _read_scene),
    "COLMAP model, text": Reader(lambda folder: _write_colmap(folder, text=True), (MODEL,), _read_scene),
    "COLMAP model, by nerfstudio": Reader(lambda folder: _write_colmap(folder, text=False), (MODEL,), _parse_scene),
    "transforms.json": Reader(_write_transforms, ("transforms.json",), _read_scene),
    "transforms.json, by nerfstudio": Reader(_write_transforms, ("transforms.json", "points.ply"), _parse_scene),
    "field": Reader(_write_field, ("field.safetensors",), _read_field),
    "generic decoder": Reader(_write_generic, ("scene_decoder.safetensors",), _read_generic),
    "VAE, LDM .safetensors": Reader(
        lambda folder: _write_ldm(folder, ".safetensors"),
        ("vae.safetensors",),
        lambda folder: _read_vae(folder / "vae.safetensors"),
    ),
    "VAE, LDM .ckpt": Reader(
        lambda folder: _write_ldm(folder, ".ckpt"), ("vae.ckpt",), lambda folder: _read_vae(folder / "vae.ckpt")
    ),
    "VAE, diffusers": Reader(_write_diffusers, ("config.json", "*.safetensors"), _read_vae),
    "points, .ply": Reader(lambda folder: _write_points(folder, ".ply"), ("points.*",), _read_points),
    "points, .ply as text": Reader(lambda folder: _write_points(folder, ".txt"), ("points.*",), _read_points),
    "points, .npz": Reader(lambda folder: _write_points(folder, ".npz"), ("points.*",), _read_points),
    "checkpoint of a run": Reader(_write_checkpoint, ("*.ckpt",), _read_checkpoint),
    "pairs": Reader(_write_pairs, ("scene/*",), _read_pairs),
}


# ---------------------------------------------------------------------------------------------------- mutations

_INTEGERS = (0, 1, 2, 3, 7, 127, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, -1.0, 1e-40, 1e-6, 1e6, 1e38, 1e308, math.inf, -math.inf, math.nan)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\0", "../../outside", "/", ".", "ä" * 300, [], {}, [[]], [None] * 4, {"x": 1}),
    *(-1, 0, 1, 2, 3, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, -1e308, math.nan, math.inf),
)
_TOKENS = (b"", b"0", b"-1", b"1e400", b"nan", b"inf", b"4294967296", b"99999999999999999999", b"x", b"\0", b"../..")


def mutate(content: bytes, suffix: str, generator: random.Random) -> bytes:
    """Return what is left of the content of a file after one to three mutations that its format suggests."""
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        structural = {".json": _in_json, ".safetensors": _in_safetensors, ".npz": _in_zip, ".ckpt": _in_zip}
        structural |= {".ply": _in_tokens, ".txt": _in_tokens}
        change = structural.get(suffix)
        if change is None or generator.random() < 0.4:
            change = _in_bytes
        content = change(content, generator)
    return content


def _in_bytes(content: bytes, generator: random.Random) -> bytes:
    if not content:
        return generator.randbytes(generator.randrange(64))
    data = bytearray(content)
    start = generator.randrange(len(data))
    length = min(generator.choice((1, 2, 4, 8, 64, 1000)), len(data) - start)
    match generator.randrange(8):
        case 0:
            data[start] ^= 1 << generator.randrange(8)
        case 1:
            data[start : start + length] = generator.randbytes(length)
        case 2:
            return bytes(data[:start])
        case 3:
            del data[start : start + length]
        case 4:
            data[start:start] = generator.randbytes(length)
        case 5:
            data[start:start] = data[start : start + length]
        case 6:
            size, kind = generator.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
            number = generator.choice(_INTEGERS) % 256**size
            start -= start % generator.choice((1, size))
            data[start : start + size] = struct.pack(f"<{kind}", number)
        case _:
            kind = generator.choice("fd")
            number = generator.choice(_FLOATS)
            if kind == "f" and 1e39 < abs(number) < math.inf:
                number = 1e38
            data[start : start + struct.calcsize(kind)] = struct.pack(f"<{kind}", number)
    return bytes(data)


def _in_json(content: bytes, generator: random.Random) -> bytes:
    try:
        tree = json.loads(content)
    except ValueError:
        return _in_bytes(content, generator)
    places: list[tuple[Any, Any]] = []
    _find_places(tree, places)
    if not places:
        return json.dumps(generator.choice(_VALUES)).encode()
    owner, key = generator.choice(places)
    match generator.randrange(5):
        case 0:
            del owner[key]
        case 1:
            other, name = generator.choice(places)
            owner[key] = json.loads(json.dumps(other[name]))
        case 2 if isinstance(owner, list):
            owner.insert(key, json.loads(json.dumps(owner[key])))
        case 3 if isinstance(owner[key], (int, float)):
            owner[key] = owner[key] * generator.choice((-1, 0, 1e-9, 1e9, 0.5, 2))
        case _:
            owner[key] = generator.choice(_VALUES)
    return json.dumps(tree).encode()


def _find_places(tree: Any, places: list[tuple[Any, Any]]) -> None:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        places.append((tree, key))
        _find_places(value, places)


def _in_safetensors(content: bytes, generator: random.Random) -> bytes:
    """Mutate the header, or one of the JSON documents in its metadata; offsets stay what they are, or not."""
    (length,) = struct.unpack_from("<Q", content.ljust(8, b"\0"))
    if not 0 < length <= len(content) - 8:
        return _in_bytes(content, generator)
    header, data = content[8 : 8 + length], content[8 + length :]
    try:
        tree = json.loads(header)
        metadata = tree["__metadata__"]
        name = generator.choice(sorted(metadata))
    except (ValueError, KeyError, TypeError, IndexError):
        metadata = None
    if metadata is not None and generator.random() < 0.5:
        metadata[name] = _in_json(str(metadata[name]).encode(), generator).decode(errors="replace")
        header = json.dumps(tree).encode()
    else:
        header = _in_json(header, generator)
    return struct.pack("<Q", len(header)) + header + data


def _in_zip(content: bytes, generator: random.Random) -> bytes:
    """Mutate a member of an archive and write the archive anew, so that its checksums are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        # Pickled structure and descriptions rather than numbers.
        names = [name for name in members if generator.random() < 0.1 or name.endswith((".pkl", ".npy"))]
        chosen = generator.choice(names or list(members))
    except Exception:  # whatever an earlier mutation has done to it
        return _in_bytes(content, generator)
    members[chosen] = _in_bytes(members[chosen], generator)
    if generator.random() < 0.05:
        members[f"../{chosen}"] = members.pop(chosen)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _in_tokens(content: bytes, generator: random.Random) -> bytes:
    """Replace, remove or repeat a word of a file of words."""
    head, end, tail = content.partition(b"end_header")
    words = head.split(b" ")
    place = generator.randrange(len(words))
    match generator.randrange(4):
        case 0:
            del words[place]
        case 1:
            words.insert(place, words[place])
        case 2:
            words[place] = generator.choice(words)
        case _:
            words[place] = generator.choice(_TOKENS)
    return b" ".join(words) + end + tail


# ---------------------------------------------------------------------------------------------------- running them


def fuzz(
    name: str, numbers: range, seed: int, folder: Path, keep: Path | None = None, timeout: float = TIMEOUT
) -> Outcome:
    """Read mutated files, each in a process that may crash or hang.

    Args:
        name: of the reader.
        numbers: of the mutations; each is the same whenever it is made.
        seed: of the mutations.
        folder: to write to.
        keep: folder for files of mutations that failed.
        timeout: seconds for one mutation.
    """
    outcome, counts = Outcome(), Counter[str]()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy", "torch", "nerfstudio.data.dataparsers.colmap_dataparser", "pycolmap"])
    following = numbers.start
    while following < numbers.stop:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (name, range(following, numbers.stop), seed, folder / str(following), keep, sender)
        process = context.Process(target=_work, args=arguments)
        process.start()
        sender.close()
        failure = ""
        try:
            assert receiver.poll(300) and receiver.recv() == "ready", f"{name}: the good files cannot be read"
        except EOFError:
            raise AssertionError(f"{name}: the good files cannot be written or read") from None
        try:
            while following < numbers.stop:
                if not receiver.poll(timeout):
                    failure = f"hangs for more than {timeout} s"
                    break
                kind, what = receiver.recv()
                counts[kind] += 1
                if kind == "failure":
                    outcome.failures.append(f"mutation {following}: {what}")
                following += 1
        except EOFError:
            process.join()
            failure = f"ends the process with exit code {process.exitcode}"
        if failure:
            outcome.failures.append(f"mutation {following}: {failure}")
            following += 1
        process.kill()
        process.join()
    outcome.read, outcome.refused = counts["read"], counts["refused"]
    return outcome


def _work(name: str, numbers: range, seed: int, folder: Path, keep: Path | None, sender: Connection) -> None:
    """Make mutations in a folder `inside`, beside one `outside` that must stay as it is."""
    import torch

    torch.set_num_threads(1)
    descriptor = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(descriptor, stream)
    warnings.simplefilter("ignore")
    reader, inside, outside = READERS[name], folder / "inside", folder / "outside"
    outside.mkdir(parents=True)
    os.environ |= {"HOME": str(outside), "XDG_CACHE_HOME": str(outside), "HF_HUB_OFFLINE": "1"}
    os.chdir(outside)
    reader.write(folder / "good")
    shutil.copytree(folder / "good", inside)
    reader.read(inside)  # the good files, which also imports and compiles all that is needed
    before = _listing(outside)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watched: list[str] = []
    sys.addaudithook(lambda event, values: _watch(event, values, inside, watched))
    files = sorted(path for pattern in reader.mutated for path in (folder / "good").glob(pattern) if path.is_file())
    sender.send("ready")
    for number in numbers:
        generator = random.Random(f"{seed} {name} {number}")
        good = generator.choice(files)
        path = inside / good.relative_to(folder / "good")
        path.write_bytes(mutate(good.read_bytes(), good.suffix, generator))
        watched.clear()
        kind, what = _attempt(reader, inside)
        if kind != "failure" and (watched or _listing(outside) != before):
            kind, what = "failure", f"touches what is not its own: {watched or _listing(outside) ^ before}"
        if kind == "failure" and keep is not None:
            (keep / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep / name / f"{number}-{path.name}")
        path.write_bytes(good.read_bytes())
        sender.send((kind, what))


def _attempt(reader: Reader, inside: Path) -> tuple[str, str]:
    """Return "read", "refused" or "failure", and what happened."""
    from lrf_nerfstudio.utils.errors import UserError

    try:
        reader.read(inside)
    except UserError as error:
        clear = str(inside) in str(error) and len(str(error)) < 3000
        return ("refused", "") if clear else ("failure", f"an error that says too little or too much: {error}"[:500])
    except BaseException as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
        return "failure", f"{type(error).__name__}: {error} ({where})"[:500]
    return "read", ""


def _listing(folder: Path) -> set[tuple[str, int]]:
    return {(str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


_ALLOWED = (os.devnull, "/dev/shm", "/proc", tempfile.gettempdir() + "/tmp")


def _watch(event: str, values: tuple[Any, ...], inside: Path, watched: list[str]) -> None:
    """Note what a reader does to files that are not its own, and that it starts programs."""
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        watched.append(f"{event} {values[:2]}")
    paths: tuple[Any, ...] = ()
    if event == "open":
        path, mode, flags = values
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        paths = (path,) if writes else ()
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate"):
        paths = values[:2]
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            text = os.path.abspath(os.fsdecode(path))
            if not text.startswith((str(inside), *_ALLOWED)) and "__pycache__" not in text:
                watched.append(f"{event} {text}")


def chunks(mutations: int, readers: tuple[str, ...]) -> Iterator[tuple[str, range]]:
    """Share mutations among readers."""
    for index, name in enumerate(readers):
        yield name, range(mutations // len(readers) + (index < mutations % len(readers)))


def main(options: FuzzReaders) -> None:
    """Mutate, and print and write the figures."""
    from lrf_nerfstudio.utils.errors import UserError

    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    if unknown := set(options.readers) - set(READERS):
        raise UserError(f"There is no reader called {unknown.pop()}; there are: {'; '.join(READERS)}.")
    begun, outcomes = time.monotonic(), dict[str, Outcome]()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutations-")))
        for name, numbers in chunks(options.mutations, options.readers or tuple(READERS)):
            outcomes[name] = outcome = fuzz(name, numbers, options.seed, folder / name, options.keep)
            print(
                f"{name}: {len(numbers)} mutations, {outcome.read} read, {outcome.refused} refused, "
                f"{len(outcome.failures)} failed",
                *outcome.failures,
                sep="\n    ",
                flush=True,
            )
    failed = sum(len(outcome.failures) for outcome in outcomes.values())
    print(f"{options.mutations} mutations in {time.monotonic() - begun:.0f} s: {failed} failed")
    if options.report is not None:
        options.report.write_text(json.dumps({name: vars(item) for name, item in outcomes.items()}, indent=1))
    if failed:
        raise UserError(f"{failed} of {options.mutations} mutations ended neither in a result nor in a clear error.")
