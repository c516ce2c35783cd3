"""Names of VAEs and scenes in tables and figures."""

from collections.abc import Sequence
from pathlib import Path

from lrf_nerfstudio.utils.errors import UserError


def named(vaes: Sequence[str], option: str) -> dict[str, str]:
    """Name -> source of VAEs given as NAME=SOURCE or SOURCE; a name has no slash, a path with = in it usually has."""
    sources = {}
    for vae in vaes:
        name, equals, source = vae.partition("=")
        sources.update({name: source} if equals and "/" not in name else {vae: vae})
    if len(sources) < len(vaes):
        raise UserError(f"Two VAEs of {option} have the same name; tell them apart with NAME=SOURCE.")
    return sources


def scene_names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, or their whole paths where names alone do not tell them apart."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder.resolve()) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError("A scene is given twice in --scenes.")
    return names
