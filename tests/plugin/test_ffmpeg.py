"""Videos can be written on a machine without an ffmpeg of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import mediapy
import numpy as np
import pytest
from nerfstudio.utils.install_checks import check_ffmpeg_installed

from lrf_nerfstudio.plugin.ffmpeg import provide_ffmpeg


def test_nerfstudio_writes_a_video_without_the_systems_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ffmpeg") is None
    provide_ffmpeg()
    check_ffmpeg_installed()  # exits without one

    ramp = np.tile(np.linspace(0, 1, 48, dtype=np.float32)[None, :, None], (32, 1, 3))
    frames = [np.roll(ramp, shift, axis=1) for shift in range(0, 48, 8)]
    with mediapy.VideoWriter(tmp_path / "video.mp4", shape=(32, 48), fps=6) as writer:  # as ns-render does
        for frame in frames:
            writer.add_image(frame)
    video = cv2.VideoCapture(str(tmp_path / "video.mp4"))
    read = [video.read()[1] for _ in frames]
    assert not video.read()[0]
    for frame, written in zip(read, frames, strict=True):
        assert np.abs(frame / 255 - written).mean() < 0.05


def test_the_systems_ffmpeg_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "ffmpeg"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    provide_ffmpeg()
    assert os.environ["PATH"] == str(tmp_path)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    code = "import shutil; from lrf_nerfstudio.plugin.ffmpeg import provide_ffmpeg as provide"
    code += "; provide(); print(shutil.which('ffmpeg'))"
    environment = os.environ | {"PATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).parent.parent == tmp_path
    assert list(tmp_path.iterdir()) == []
