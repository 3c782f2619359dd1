"""Results out and in again: a rewritten model as a folder that other programs can read.

The folder holds ``model.pt2`` (loads with a bare `torch.export.load` after
``import attn_rewrite.ops``, without transformers), ``plan.json`` with its tables in
``plan.safetensors``, ``report.json``, the tokenizer and configuration files of the checkpoint, and
``attn_rewrite.json``: versions, the original's path and hashes, and the hash of every file.
"""

from __future__ import annotations

import importlib
import json
import platform
import shutil
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from attn_rewrite.checkpoints.files import read_json, sha256
from attn_rewrite.errors import CheckpointError
from attn_rewrite.folder import output_folder
from attn_rewrite.tables import FILE as TABLES
from attn_rewrite.tables import write_tables

if TYPE_CHECKING:
    from attn_rewrite.checkpoint import LoadedModel
    from attn_rewrite.optimized import OptimizedModule

MANIFEST = "attn_rewrite.json"
FORMAT = 1
_LIBRARIES = ("torch", "transformers", "diffusers", "onnx", "onnxruntime", "triton", "safetensors")


def save(
    optimized: OptimizedModule,
    directory: str | Path,
    *,
    force: bool = False,
    source: LoadedModel | None = None,
) -> Path:
    """Write ``optimized`` to the new folder ``directory`` and return its path.

    The folder appears whole or not at all; with ``force`` an earlier result is replaced.
    ``source`` is the checkpoint the model came from: its path and hashes are kept, its tokenizer
    and configuration files copied.  Raises `PolicyError` for a folder that is occupied or not
    writable, `ToolError` when the disk is full.
    """
    with output_folder(directory, force=force) as part:
        write_result(optimized, part, source=source)
        seal(part, source=source, training=optimized.training)
    return Path(directory)


def write_result(
    optimized: OptimizedModule, folder: Path, *, source: LoadedModel | None = None
) -> None:
    """The files of a result, without the manifest, into an existing folder."""
    from attn_rewrite.portable import save_program

    if source is not None:
        _copy_companions(source, folder)
    save_program(optimized.program, folder / "model.pt2", optimized.form, optimized.anchors)
    _write_json(folder / "plan.json", optimized.plan.to_json())
    if optimized.plan.tables:
        write_tables(optimized.plan.tables, folder / TABLES)
    _write_json(folder / "report.json", optimized.report.to_json())


def seal(folder: Path, *, source: LoadedModel | None = None, training: bool = False) -> None:
    """Write the manifest of ``folder``: call it last, it hashes every file that is there.

    ``training`` is the mode the model was captured in, which a program does not say itself.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    origin = None
    if source is not None:
        origin = {"path": source.path, "kind": source.kind, "hashes": source.hashes}
    _write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "versions": versions(),
            "source": origin,
            "training": training,
            "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
        },
    )


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that are installed.

    That of PyTorch names its build too: an index may leave it out (2.11.0 for 2.11.0+cu130).
    """
    found = {"python": platform.python_version(), "attn-rewrite": metadata.version("attn-rewrite")}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"torch": str(importlib.import_module("torch").__version__)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _copy_companions(source: LoadedModel, folder: Path) -> None:
    for name in source.companions:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(source.path) / name, target)


def load(directory: str | Path) -> OptimizedModule:
    """The model saved in ``directory``: its program, plan and report, files checked by their hash.

    Outputs have the class they had where transformers or diffusers is installed, and are plain
    dictionaries otherwise.  Raises `CheckpointError` for a folder that is no result, was changed or
    is incomplete.
    """
    folder = Path(directory)
    manifest = check_result(folder)
    importlib.import_module("attn_rewrite.ops")  # a saved program refers to these operators by name
    from attn_rewrite.optimized import OptimizedModule
    from attn_rewrite.plan import Plan
    from attn_rewrite.portable import read_form, read_marks, read_program
    from attn_rewrite.report import Report

    program = read_program(folder / "model.pt2")
    plan = Plan.from_json(read_json(folder / "plan.json"), tables=folder / TABLES)
    report = Report.from_json(read_json(folder / "report.json"))
    form = read_form(folder / "model.pt2")
    module = OptimizedModule.from_program(
        program,
        plan=plan,
        report=report,
        form=form,
        folder=folder,
        anchors=read_marks(folder / "model.pt2").anchors,
    )
    module.training = bool(manifest.get("training", False))
    return module


def check_result(folder: Path) -> dict[str, Any]:
    """The manifest of a result whose files are all there and unchanged, else `CheckpointError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a result of attn-rewrite: it has no {MANIFEST}; "
            "name a folder that `optimize -o` or `save` wrote"
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r}, expected {FORMAT}; "
            "write the result again with this version"
        )
    files = manifest.get("files")
    needed = {"model.pt2", "plan.json", "report.json"}
    if not isinstance(files, dict) or not needed <= files.keys():
        raise CheckpointError(f"{path} does not list the files of the result; write it again")
    for name, digest in files.items():
        _check_file(folder, name, digest)
    return manifest


def _check_file(folder: Path, name: str, digest: object) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{folder / MANIFEST} points outside its folder: {name!r}")
    path = folder / relative
    if not path.is_file():
        raise CheckpointError(f"{path} is missing from the result; write it again")
    if sha256(path) != digest:
        raise CheckpointError(
            f"{path} was changed or damaged after it was written (its hash differs); "
            "write the result again"
        )
