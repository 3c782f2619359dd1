"""Outputs of two runs of a model, compared leaf by leaf."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from attn_rewrite.errors import VerifyError
from attn_rewrite.measuring import measure
from attn_rewrite.report import ErrorMeasure


def compare_outputs(original: Any, rewritten: Any) -> dict[str, ErrorMeasure]:
    """The error of every floating tensor of a model's output, by its place in the output.

    Raises `VerifyError` if the outputs have another structure or shape.
    """
    wanted, wanted_spec = _places(original)
    found, found_spec = _places(rewritten)
    if wanted_spec != found_spec:
        raise VerifyError(f"the rewritten model returns {found_spec}, the original {wanted_spec}")
    errors: dict[str, ErrorMeasure] = {}
    for (name, reference), (_, result) in zip(wanted, found, strict=True):
        if not isinstance(reference, Tensor) or not reference.is_floating_point():
            continue
        if not isinstance(result, Tensor) or result.shape != reference.shape:
            shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise VerifyError(f"output {name} is {shape}, in the original {list(reference.shape)}")
        errors[name] = measure(result, reference)
    return errors


def _places(output: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Every leaf of an output with its place, and the structure.

    A container that was registered without names of its fields (diffusers' outputs) gives numbers.
    """
    try:
        leaves, spec = pytree.tree_flatten_with_path(output)
    except ValueError:
        plain, spec = pytree.tree_flatten(output)
        return [(str(i), leaf) for i, leaf in enumerate(plain)], spec
    return [(".".join(map(_place, path)) or "output", leaf) for path, leaf in leaves], spec


def _place(key: Any) -> str:
    """One step into an output: the key, the index or the field."""
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)
