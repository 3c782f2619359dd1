"""Inputs to capture and measure a model with: generated from its configuration, or from a file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attn_rewrite.checkpoints.diffusers_inputs import diffusers_inputs
from attn_rewrite.checkpoints.recipe import Recipe, caches, position_limit
from attn_rewrite.checkpoints.transformers_inputs import transformers_inputs
from attn_rewrite.errors import CheckpointError, PolicyError

DEFAULT_BATCH = 2
DEFAULT_LENGTH = 128


@dataclass(frozen=True, eq=False)
class Inputs:
    """Keyword arguments of a forward, and sentences on how they were made."""

    kwargs: dict[str, Any]
    notes: tuple[str, ...]


def generate_inputs(
    model: torch.nn.Module, *, batch: int | None, length: int | None, seed: int = 0
) -> Inputs:
    """Random inputs that suit a transformers or diffusers model, by its signature and config.

    Token ids are [B, L], images [B, C, H, W], audio [B, T] or [B, mel, T], latents as the class of
    the model wants them.  Raises `CheckpointError` where an argument that the model needs is
    unknown, `PolicyError` where ``length`` is over the positions that the model has.
    """
    parameters = inspect.signature(model.forward).parameters
    limit = position_limit(model)
    if length is not None and limit is not None and length > limit:
        raise PolicyError(
            f"length {length} is over the {limit} positions of {type(model).__name__}; "
            f"ask for at most {limit}"
        )
    rows = DEFAULT_BATCH if batch is None else batch
    tokens = min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH) if length is None else length
    recipe = Recipe(model, parameters, rows, tokens, torch.Generator().manual_seed(seed))
    diffusion = hasattr(model, "config") and isinstance(model.config, Mapping)
    kwargs = dict(diffusers_inputs(recipe) if diffusion else transformers_inputs(recipe))
    _check_complete(model, parameters, kwargs)
    shown = ", ".join(_shape_text(name, value) for name, value in kwargs.items())
    return Inputs(
        kwargs, (f"inputs generated: batch {rows}, length {tokens}, seed {seed}: {shown}",)
    )


def _shape_text(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{name} {'x'.join(str(size) for size in value.shape)}"
    return f"{name}={value}"


def _check_complete(
    model: torch.nn.Module, parameters: Mapping[str, inspect.Parameter], kwargs: Mapping[str, Any]
) -> None:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    lacking = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in variable and name not in kwargs
    ]
    if lacking or not kwargs:
        raise CheckpointError(
            f"inputs for {type(model).__name__} cannot be generated: nothing is known about "
            f"{', '.join(lacking) or 'its arguments'}; give them with --inputs FILE.safetensors "
            f"(names: {', '.join(parameters)})"
        )


def read_inputs(path: Path, model: torch.nn.Module) -> Inputs:
    """The tensors of a safetensors file as arguments of ``model.forward``.

    Raises `CheckpointError` for an unreadable file, a name that is no argument (with the nearest
    one), a rank or kind of number that the argument cannot have, or a needed argument that lacks.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot read the inputs {path} ({error}); expected a safetensors file"
        ) from error
    parameters = inspect.signature(model.forward).parameters
    _check_names(path, model, parameters, tensors)
    _check_kinds(path, model, tensors)
    kwargs: dict[str, Any] = dict(tensors)
    if "use_cache" in parameters and "use_cache" not in kwargs and caches(model):
        kwargs["use_cache"] = False
    _check_complete(model, parameters, kwargs)
    shown = ", ".join(_shape_text(name, value) for name, value in tensors.items())
    return Inputs(kwargs, (f"inputs from {path.name}: {shown}",))


def _check_names(
    path: Path,
    model: torch.nn.Module,
    parameters: Mapping[str, inspect.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in tensors:
        near = difflib.get_close_matches(name, parameters, n=1)
        if name not in parameters and (near or not open_ended):
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CheckpointError(
                f"{path} has a tensor {name!r}, which is no argument of "
                f"{type(model).__name__}.forward{hint or ' (' + ', '.join(parameters) + ')'}"
            )


def _check_kinds(path: Path, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare with generated inputs, where some can be generated for this model."""
    if not hasattr(model, "config"):
        return
    try:
        expected = generate_inputs(model, batch=None, length=None).kwargs
    except CheckpointError:
        return
    for name, tensor in tensors.items():
        like = expected.get(name)
        if not isinstance(like, torch.Tensor):
            continue
        if tensor.dim() != like.dim():
            raise CheckpointError(
                f"{path}: {name} has {tensor.dim()} dimensions {list(tensor.shape)}, expected "
                f"{like.dim()} as in {list(like.shape)}"
            )
        if tensor.is_floating_point() and not like.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} has {tensor.dtype} values, expected whole numbers ({like.dtype})"
            )
