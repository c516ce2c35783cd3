"""The command that makes training scenes: the same files at every run, nothing twice, failures left out."""

from pathlib import Path

import pytest

from lrf_nerfstudio.commands import make_training_scenes
from lrf_nerfstudio.commands.make_training_scenes import TrainingScenes
from lrf_nerfstudio.synthetic.random_scenes import random_scene
from lrf_nerfstudio.utils.errors import UserError


def make(folder: Path, **options: object) -> Path:
    settings = {"views": 9, "size": (24, 32), "samples": 1, "points": 50, "count": 3} | options
    make_training_scenes.main(TrainingScenes(output=folder, **settings))  # type: ignore[arg-type]
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_run_gives_the_same_files_also_in_shards(tmp_path: Path) -> None:
    whole = contents(make(tmp_path / "whole", first_seed=4))
    assert {name.split("/")[0] for name in whole} == {"scene_00004", "scene_00005", "scene_00006"}
    for shard in (1, 0):
        make(tmp_path / "shards", first_seed=4, num_shards=2, shard_index=shard)
    assert contents(tmp_path / "shards") == whole


def test_scenes_that_are_there_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "scenes", count=2)
    before = contents(folder)
    made = []

    def counted(seed: int, *arguments: object) -> object:
        made.append(seed)
        return random_scene(seed, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(make_training_scenes, "random_scene", counted)
    after = contents(make(folder, count=3))
    assert made == [2]
    assert before.items() <= after.items() and len(after) > len(before)


def test_scenes_that_fail_are_reported_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scenes" / "scene_00001").mkdir(parents=True)
    (tmp_path / "scenes" / "scene_00001" / "notes.txt").write_text("mine")
    good = random_scene

    def broken(seed: int, *arguments: object) -> object:
        if seed == 2:
            raise ZeroDivisionError("no lamp")
        return good(seed, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(make_training_scenes, "random_scene", broken)
    with pytest.raises(UserError, match=r"2 of 4 scenes failed.*seeds 1, 2"):
        make(tmp_path / "scenes", count=4)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Scene 1 is left out" in printed and "something else" in printed and "no lamp" in printed
    whole = {path.parent.name for path in (tmp_path / "scenes").glob("*/transforms.json")}
    assert whole == {"scene_00000", "scene_00003"}
    assert [path.name for path in (tmp_path / "scenes" / "scene_00001").iterdir()] == ["notes.txt"]
