"""Models in: a folder, an exported program or a function becomes a model with example inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from attn_rewrite.checkpoints.callables import make_model
from attn_rewrite.checkpoints.exported import load_program
from attn_rewrite.checkpoints.files import companion_files, sha256
from attn_rewrite.checkpoints.huggingface import LoadOptions, load_folder
from attn_rewrite.checkpoints.inputs import Inputs, generate_inputs, read_inputs
from attn_rewrite.errors import CheckpointError, PolicyError

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode, inputs to capture it with, and where it came from.

    ``kind`` is transformers, diffusers, exported or callable.  ``path`` is the folder or file (the
    spec itself for a callable), ``hashes`` the SHA-256 of each weight file by its name,
    ``companions`` the tokenizer and configuration files relative to ``path``.  ``program`` is set
    for an exported program, which needs no capture.
    """

    model: torch.nn.Module = field(repr=False)
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    dynamic_shapes: Any
    kind: str
    path: str
    hashes: dict[str, str]
    notes: tuple[str, ...]
    companions: tuple[str, ...] = ()
    program: ExportedProgram | None = field(default=None, repr=False)

    @property
    def subject(self) -> torch.nn.Module | ExportedProgram:
        """What is captured: the program where there is one, else the model."""
        return self.model if self.program is None else self.program


@dataclass(frozen=True)
class _Request:
    """What `load_model` was asked for besides the model."""

    batch: int | None
    length: int | None
    device: str
    inputs: Path | None
    options: LoadOptions

    @property
    def wants_own_inputs(self) -> bool:
        """Whether the caller asked for other inputs than those a source brings along."""
        return self.inputs is not None or self.batch is not None or self.length is not None


def load_model(
    spec: str | Path,
    *,
    batch: int | None = None,
    length: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    inputs: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load the model ``spec`` names, with inputs from ``inputs`` or generated from its config.

    ``spec`` is a transformers folder, a diffusers component folder, a ``.pt2`` file, or
    ``module:callable`` returning a model or ``(model, args, kwargs, dynamic_shapes)``.  ``batch``
    and ``length`` size generated inputs (2 and 128 by default, seed 0); ``inputs`` is a safetensors
    file whose names are arguments of the model.  ``dtype`` None keeps the checkpoint's.
    ``trust_remote_code`` runs code that comes with a checkpoint, ``allow_pickle`` reads pickle
    weights (tensors only).  Raises `CheckpointError` for whatever cannot be read, `PolicyError` for
    a device that is not here.
    """
    _check_device(device)
    options = LoadOptions(dtype, trust_remote_code, allow_pickle)
    request = _Request(batch, length, device, Path(inputs) if inputs else None, options)
    text, path = str(spec), Path(spec)
    if _CALLABLE.fullmatch(text) and not path.exists():
        return _from_callable(text, request)
    if path.is_dir():
        return _from_folder(path, request)
    if path.is_file():
        return _from_file(path, request)
    raise CheckpointError(
        f"there is no model at {text}; expected a model folder, a .pt2 file or module:callable"
    )


def _check_device(text: str) -> None:
    """Raise `PolicyError` unless a tensor can be put on the device ``text`` names."""
    try:
        torch.zeros(1, device=text).item()  # "meta" is a device without numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise PolicyError(
            f"the device {text!r} cannot be used here ({reason}); name one that this PyTorch "
            "has: cpu, or cuda on a machine with a GPU"
        ) from error


def _from_folder(path: Path, request: _Request) -> LoadedModel:
    try:
        kind, loaded = load_folder(path, request.options)
    except PermissionError as error:
        raise CheckpointError(
            f"cannot read {error.filename or path}: permission denied; check its permissions"
        ) from error
    model = loaded.model.to(request.device)
    made = _make_inputs(model, request)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return LoadedModel(
        model=model,
        args=(),
        kwargs=_on_device(made.kwargs, request.device),
        dynamic_shapes=None,
        kind=kind,
        path=str(path.resolve()),
        hashes=loaded.weights.hashes(),
        notes=(f"weights are {str(dtype).removeprefix('torch.')}", *loaded.notes, *made.notes),
        companions=tuple(str(name) for name in companion_files(path)),
    )


def _from_file(path: Path, request: _Request) -> LoadedModel:
    if path.suffix != ".pt2":
        raise CheckpointError(
            f"{path} is a file, expected a model folder (config.json with safetensors), a .pt2 "
            "exported program or module:callable; name the folder that holds it"
        )
    if request.options.dtype is not None:
        raise CheckpointError(
            f"{path} is an exported program, whose dtype is fixed; export the model again in "
            f"{request.options.dtype} instead of passing a dtype"
        )
    program = load_program(path)
    if request.device != "cpu":
        program = move_to_device_pass(program, request.device)
    model = program.module()
    args, kwargs, notes = _program_inputs(program, model, path, request)
    return LoadedModel(
        model=model,
        args=args,
        kwargs=kwargs,
        dynamic_shapes=None,
        kind="exported",
        path=str(path.resolve()),
        hashes={path.name: sha256(path)},
        notes=notes,
        program=program,
    )


def _program_inputs(
    program: ExportedProgram, model: torch.nn.Module, path: Path, request: _Request
) -> tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]:
    if request.inputs is not None:
        made = read_inputs(request.inputs, model)
        return (), _on_device(made.kwargs, request.device), made.notes
    if request.batch is not None or request.length is not None:
        raise CheckpointError(
            f"inputs of a batch or length of its own cannot be generated for {path}: an exported "
            "program has no configuration; give them with --inputs FILE.safetensors"
        )
    if not program.example_inputs:
        raise CheckpointError(
            f"{path} holds no example inputs; give them with --inputs FILE.safetensors"
        )
    args, kwargs = _on_device(program.example_inputs, request.device)
    return args, kwargs, ("inputs are those the program was exported with",)


def _from_callable(spec: str, request: _Request) -> LoadedModel:
    made = make_model(spec)
    model = made.model
    if request.options.dtype is not None:
        model = model.to(request.options.dtype)
    model = model.to(request.device)
    args, kwargs = _cast((made.args, made.kwargs), request.options.dtype)
    notes: tuple[str, ...] = (f"inputs are those that {spec} returned",)
    if request.wants_own_inputs or not made.has_inputs:
        generated = _make_inputs(model, request)
        args, kwargs, notes = (), generated.kwargs, generated.notes
    return LoadedModel(
        model=model,
        args=tuple(_on_device(args, request.device)),
        kwargs=_on_device(kwargs, request.device),
        dynamic_shapes=made.dynamic_shapes,
        kind="callable",
        path=spec,
        hashes={},
        notes=(*_mode_note(model), *notes),
    )


def _mode_note(model: torch.nn.Module) -> tuple[str, ...]:
    return ("the model is in train mode, as it was returned",) if model.training else ()


def _make_inputs(model: torch.nn.Module, request: _Request) -> Inputs:
    if request.inputs is not None:
        return read_inputs(request.inputs, model)
    if not hasattr(model, "config"):
        raise CheckpointError(
            f"inputs for {type(model).__name__} cannot be generated: it has no config; give them "
            "with --inputs FILE.safetensors or return (model, args, kwargs, dynamic_shapes)"
        )
    return generate_inputs(model, batch=request.batch, length=request.length)


def _on_device(tree: Any, device: str) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """Floating tensors in ``dtype``; everything as it is without one."""
    if dtype is None:
        return tree
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree
    )
