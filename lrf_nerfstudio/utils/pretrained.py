"""Pretrained networks in the formats of diffusers and transformers: from the hub, loaded whole or not at all."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lrf_nerfstudio.utils.errors import UserError


def hub_folder(
    repository: str, patterns: Sequence[str], ignored: Sequence[str], complete: Callable[[Path], bool]
) -> Path:
    """Return the local folder of a Hugging Face repository: the hub's cache where that suffices, else a download.

    Args:
        repository: `owner/name`.
        patterns: files to fetch, as shell patterns.
        ignored: files among them not to fetch.
        complete: tells whether a folder of the cache holds what is needed, in which case nothing is asked of the hub.

    Raises:
        OSError: if the repository is not on this machine and cannot be fetched; the message is the hub client's.
    """
    from huggingface_hub import constants, snapshot_download

    def folder(local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
                local_files_only=local_files_only,
            )
        )

    # The hub client raises its own exceptions, its HTTP library's and the system's.
    try:
        cached = folder(local_files_only=True)
    except Exception:
        cached = None
    if cached is not None and (complete(cached) or constants.HF_HUB_OFFLINE):
        return cached
    try:
        return folder(local_files_only=constants.HF_HUB_OFFLINE)
    except Exception as error:
        raise OSError(first_line(error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep diffusers and transformers from warning and from progress bars of their own while they load or save."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    settings = [sys.modules.get(f"{logger.name}.utils.logging") for logger in loggers]
    with_bars = [setting for setting in settings if setting is not None and setting.is_progress_bar_enabled()]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    for setting in with_bars:
        setting.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for setting in with_bars:
            setting.enable_progress_bar()


def check_all_loaded(report: Mapping[str, Any], where: str, ignored: Sequence[str] = ()) -> None:
    """Check that the weights of a file were those of its model, none more and none less.

    Args:
        report: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
        where: the folder and the option that names it, for the message.
        ignored: endings of names that may be in the file though the model does not have them.

    Raises:
        UserError: if weights are missing, of another shape, or not the model's.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(str(name) for name in report.get(problem) or ())
        if problem == "unexpected_keys":
            names = [name for name in names if not name.endswith(tuple(ignored))]
        if names:
            raise UserError(
                f"The weights in {where} do not fit its config.json: {problem.replace('_', ' ')} "
                f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            )


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
