"""Tables of truths that belong to a plan: block lists, one bit each, hashed and kept beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attn_rewrite.errors import PolicyError

Table = npt.NDArray[np.bool_]
FILE = "plan.safetensors"


def digest(table: Table) -> str:
    """SHA-256 of the shape and the bits."""
    head = "x".join(map(str, table.shape)).encode()
    return hashlib.sha256(head + b":" + np.packbits(table).tobytes()).hexdigest()


def describe(tables: Mapping[str, Table]) -> dict[str, Any]:
    """What ``plan.json`` says of each table: its shape and hash."""
    return {n: {"shape": list(t.shape), "sha256": digest(t)} for n, t in sorted(tables.items())}


def write_tables(tables: Mapping[str, Table], path: Path) -> None:
    """Write the bits of every table, packed eight to a byte."""
    from safetensors.numpy import save_file

    save_file({n: np.packbits(t) for n, t in tables.items()}, path)


def read_tables(described: object, path: Path | None) -> dict[str, Table]:
    """The tables that a plan describes, from the file beside it.

    Raises `PolicyError` where the file or a table is missing, or is not the one described.
    """
    if not described:
        return {}
    if not isinstance(described, dict):
        raise PolicyError(f"plan, tables: found {described!r}, expected a table of tables")
    if path is None or not path.is_file():
        where = "no file was given" if path is None else f"{path} is missing"
        raise PolicyError(
            f"the plan has {len(described)} tables, which {FILE} beside it holds: {where}"
        )
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        packed = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"{path} cannot be read: {error}") from None
    return {name: _unpacked(name, entry, packed, path) for name, entry in described.items()}


def _unpacked(
    name: str, entry: object, packed: Mapping[str, npt.NDArray[np.uint8]], path: Path
) -> Table:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    sizes = isinstance(shape, list) and all(isinstance(n, int) and n > 0 for n in shape)
    if not sizes or name not in packed:
        raise PolicyError(f"plan, tables: {name!r} is not in {path}, or has no shape")
    assert isinstance(entry, dict)
    assert isinstance(shape, list)
    count = int(np.prod(shape))
    bits = np.unpackbits(packed[name])[:count]
    if len(bits) < count:
        raise PolicyError(f"plan, tables: {name!r} is {shape}, but {path} holds {len(bits)} bits")
    table = bits.reshape(shape).astype(np.bool_)
    if digest(table) != entry.get("sha256"):
        raise PolicyError(f"plan, tables: {name!r} in {path} is not the one the plan was made with")
    return table
