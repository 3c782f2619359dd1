"""An output folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attn_rewrite.errors import PolicyError, ToolError

RESULT_FILES = ("attn_rewrite.json", "report.json", "plan.json", "model.pt2")
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def check_output(path: str | Path, *, force: bool = False) -> None:
    """Raise `PolicyError` if a result cannot go to ``path``: occupied, or not a folder.

    An absent or empty folder is free.  With ``force`` an earlier result is replaced, and only that:
    a folder without any of `RESULT_FILES` is never removed.
    """
    target = Path(path)
    if target.is_dir():
        names = os.listdir(target)
        if not names:
            return
        if not any(name in RESULT_FILES for name in names):
            raise PolicyError(
                f"the output folder {target} holds other files ({sorted(names)[0]}); "
                "name a new or empty folder"
            )
        if not force:
            raise PolicyError(
                f"the output folder {target} already holds a result; "
                "name another folder or pass --force to replace it"
            )
    elif target.exists() or target.is_symlink():
        raise PolicyError(f"the output {target} is not a folder; name a new or empty folder")


@contextmanager
def output_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write into, renamed to ``path`` when the block ends.

    When the block raises (Ctrl-C too) nothing is left and an earlier result is untouched.  Raises
    `PolicyError` as `check_output` does or where the place is not writable, and `ToolError` with
    stage "write" when the disk is full or fails.
    """
    check_output(path, force=force)
    target = Path(path).resolve()
    made_parents = _missing_parents(target)
    part = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        _make(part, path)
        yield part
        _sync(part)
        _publish(part, target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        for parent in made_parents:
            _remove_if_empty(parent)
        if isinstance(error, Exception) and (reason := _disk_failure(error)):
            raise ToolError(
                f"cannot write the output folder {path}: {reason}; free some space or name a "
                "folder on another disk (nothing was left behind)",
                stage="write",
            ) from error
        raise


def _missing_parents(target: Path) -> list[Path]:
    """The parents that will have to be made, innermost first."""
    return [parent for parent in target.parents if not parent.exists()]


def _make(part: Path, asked: str | Path) -> None:
    try:
        part.mkdir(parents=True)
    except OSError as error:
        if error.errno in _DISK_ERRNOS:
            raise
        raise PolicyError(
            f"the output folder {asked} cannot be written: {error.strerror or error}; "
            "name a folder in a place where you may write"
        ) from error


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _sync(folder: Path) -> None:
    """Put every file and folder entry on the disk, so that the rename publishes finished data."""
    for place, _, names in os.walk(folder):
        for name in (*names, "."):
            handle = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _publish(part: Path, target: Path) -> None:
    """Rename ``part`` to ``target``; an earlier result steps aside, and comes back on failure."""
    if not target.exists():
        part.rename(target)
        return
    old = part.with_suffix(".replaced")
    target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _disk_failure(error: BaseException) -> str | None:
    """What the disk said, if ``error`` (or what caused it) comes from writing to it."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in _DISK_ERRNOS:
            return chain.strerror or str(chain)
        if isinstance(chain, RuntimeError) and "PytorchStreamWriter failed" in str(chain):
            return "the disk took only a part of the model"
        chain = chain.__cause__ or chain.__context__
    return None
