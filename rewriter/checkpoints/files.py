"""The files of a checkpoint folder, checked before anything is loaded from them.

Every doubt about a file is a `CheckpointError` here, in one sentence, so that the loaders behind
never see a broken or hostile folder.  No file is opened whose name leaves the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_rewrite.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe")
_NOT_COMPANIONS = (".index.json", "plan.json", "report.json", "attn_rewrite.json")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder: safetensors, or pickle where the user allowed it."""

    files: tuple[Path, ...]
    pickle: bool

    def hashes(self) -> dict[str, str]:
        """File name -> SHA-256 of its bytes."""
        return {path.name: sha256(path) for path in self.files}


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"cannot read {path}: {reason}; check the path and its permissions"
        ) from error
    except ValueError as error:  # malformed JSON or not UTF-8
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); copy or download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def find_weights(folder: Path, stem: str, *, allow_pickle: bool) -> WeightFiles:
    """The weight files ``stem``.safetensors (or sharded, by an index) of ``folder``, checked.

    Pickle files are taken only with ``allow_pickle``, and only where there is no safetensors file.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if index.is_file():
        files = _indexed_files(index)
    elif single.is_file():
        files = (single,)
    else:
        return _pickle_weights(folder, allow_pickle=allow_pickle)
    keys = {path.name: _safetensors_keys(path) for path in files}
    if index.is_file():
        _check_index_keys(index, keys)
    return WeightFiles(files, pickle=False)


def _indexed_files(index: Path) -> tuple[Path, ...]:
    """The shards an index names; every one must be an existing file directly in its folder."""
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise CheckpointError(
                f"{index} points outside its folder: shard {name!r} is not a plain file name; "
                "do not use this checkpoint unless you trust its author, and correct the index"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"the shard {name} named in {index} is missing; copy or download it again"
            )
    return tuple(index.parent / name for name in names)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; copy or download it again")
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index} maps {key} to {name!r}, expected a file name")
    return weight_map


def _check_index_keys(index: Path, keys: dict[str, frozenset[str]]) -> None:
    for key, name in _weight_map(index).items():
        if key not in keys[name]:
            raise CheckpointError(
                f"{index} says that {name} holds {key}, but it does not; "
                "the index and the shards are of different checkpoints: download both again"
            )


def _safetensors_keys(path: Path) -> frozenset[str]:
    """The tensor names of a file whose header agrees with its length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            return frozenset(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or corrupted ({error}); copy or download it again"
        ) from error


def _pickle_weights(folder: Path, *, allow_pickle: bool) -> WeightFiles:
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in PICKLE_SUFFIXES and path.is_file() and path.stem not in _NOT_WEIGHTS
    )
    if not found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder} has no weights: expected a .safetensors file or index, found {names}"
        )
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} has only pickle weights ({found[0].name}), which can run any code when "
            "read; convert them to safetensors, or pass --allow-pickle to read tensors only"
        )
    for index in folder.glob("*.bin.index.json"):
        _indexed_files(index)
    return WeightFiles(tuple(found), pickle=True)


def companion_files(folder: Path) -> tuple[Path, ...]:
    """Configuration and tokenizer files to keep next to a result, relative to ``folder``.

    Top-level text files, and the ``config.json`` of each module that a sentence-transformers
    ``modules.json`` lists.
    """
    top = [
        path.relative_to(folder)
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in _COMPANION_SUFFIXES
        and not path.name.endswith(_NOT_COMPANIONS)
    ]
    return tuple(sorted({*top, *_sentence_modules(folder)}))


def _sentence_modules(folder: Path) -> Iterable[Path]:
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        entries = []  # not ours to judge: it is copied as it is
    for entry in entries if isinstance(entries, list) else []:
        name = entry.get("path") if isinstance(entry, dict) else None
        config = folder / str(name) / "config.json"
        if name and Path(name).name == name and config.is_file():
            yield config.relative_to(folder)
