"""A program named ffmpeg for nerfstudio's renderers on machines that have none."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def provide_ffmpeg() -> None:
    """Put the ffmpeg of the package imageio-ffmpeg on this process's PATH, unless there is one.

    ns-render looks for a program of exactly that name (`shutil.which("ffmpeg")`, in its own check and in mediapy), and
    stops without it. The one inside imageio-ffmpeg's wheel is named after its version, so it gets a link in a
    temporary folder, which goes when the process ends. Where the wheel has no program for this platform, nothing
    happens: nerfstudio then says what to install.
    """
    if shutil.which("ffmpeg"):
        return
    import imageio_ffmpeg

    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        return
    folder = tempfile.mkdtemp(prefix="lrf-ffmpeg-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (Path(folder) / "ffmpeg").symlink_to(program)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), folder])
