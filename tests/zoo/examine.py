"""Examine one row: count, capture, find, rewrite exactly, compare with float64."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch.utils import _pytree as pytree

from attn_rewrite.capture import capture_model
from attn_rewrite.driver import Stopwatch, decide, spliced
from attn_rewrite.errors import AttnRewriteError, CaptureError
from attn_rewrite.passes.canonicalize import canonicalize
from attn_rewrite.passes.find import find
from attn_rewrite.policy import Policy
from tests.zoo.census import census
from tests.zoo.just_in_time import JustInTime
from tests.zoo.rows import NotOfferedError, Result, Row


def examine(
    row: Row, dtypes: tuple[torch.dtype, ...] = (torch.float32,), *, fixed: bool = False
) -> Result:
    """Everything about a row; exceptions become a stage and a reason.

    Sizes are dynamic where they can be in the first type, unless they are ``fixed`` to those of the
    example; the other types are about the numbers.  Where the library runs the model in none of
    ``dtypes``, it is examined in float32.
    """
    result = Result(row.name)
    start = time.process_time()
    try:
        model, args, kwargs = made(row)
        counted = census(model, args, kwargs)
    except NotOfferedError as error:
        result.stage, result.problem = "absent", str(error)
        return result
    except Exception as error:  # whatever the library raises: the row cannot be run here
        result.stage, result.problem = "build", _one_line(error)
        return result
    result.expected, result.factorised = counted.attentions, counted.factorised
    del counted
    for place, dtype in enumerate(_runnable(result, row, dtypes)):
        try:
            _in_dtype(result, row, dtype, fixed=fixed or place > 0, first=place == 0)
        except AttnRewriteError as error:
            result.stage, result.problem = "capture", _one_line(error)
        except Exception as error:  # our own bug, or an operator that has no float64
            result.stage, result.problem = "failed", _one_line(error)
        if result.stage != "done":
            break
    result.seconds = time.process_time() - start
    return result


def made(row: Row, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Any, Any]:
    """The model of a row and its inputs, the same at every call but for the type."""
    torch.manual_seed(0)
    model, args, kwargs = row.build()
    return model.eval().to(dtype), cast(args, dtype), cast(kwargs, dtype)


def _runnable(result: Result, row: Row, dtypes: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    """Those of ``dtypes`` that the library runs (Fourier transforms and fixed types do not)."""
    out = []
    for dtype in dtypes:
        if dtype == torch.float32 or _runs(row, dtype):
            out.append(dtype)
        else:
            result.kept.append(("not-compared", f"the library does not run it in {dtype}"))
    return tuple(out) or (torch.float32,)


def _in_dtype(result: Result, row: Row, dtype: torch.dtype, *, fixed: bool, first: bool) -> None:
    model, args, kwargs = made(row, dtype)
    try:
        captured = capture_model(model, args, kwargs, dynamic_shapes={} if fixed else None)
    except CaptureError as error:
        _just_in_time(result, row, model, dtype, error, first=first)
        return
    findings = find(canonicalize(captured.graph))
    _, decisions = decide(findings, Policy.parse("exact"), None, Stopwatch())
    if first:
        result.found = len(findings.sites)
        result.rewritten = sum(d.kernel is not None for d in decisions)
        for site in findings.sites:
            result.families[site.family] = result.families.get(site.family, 0) + 1
        result.refused = [(r.code, r.reason, r.source or "") for r in findings.refusals]
        result.kept += [(r.code, r.reason) for s in findings.sites for r in s.refusals]
        result.kept += [(d.refusal.code, d.refusal.reason) for d in decisions if d.refusal]
    if any(d.kernel is not None for d in decisions):
        error = compare(row, model, spliced(captured, decisions).graph, dtype)
        if isinstance(error, str):
            result.kept.append(("not-compared", error))
        else:
            result.errors[str(dtype).removeprefix("torch.")] = error


def _runs(row: Row, dtype: torch.dtype) -> bool:
    """Whether the original runs in a type at all."""
    model, args, kwargs = made(row, dtype)
    try:
        model(*args, **kwargs)
    except RuntimeError:
        return False
    return True


def _just_in_time(
    result: Result,
    row: Row,
    model: torch.nn.Module,
    dtype: torch.dtype,
    why: CaptureError,
    *,
    first: bool,
) -> None:
    """The row through the other front end; its failure leaves the first one's reason."""
    module = JustInTime(model)
    try:
        error = compare(row, model, module, dtype)
    except Exception as problem:  # of Dynamo, or of code that it runs half traced
        raise why from problem
    if first:
        result.found, result.rewritten = module.found, module.rewritten
        result.families, result.refused = module.families, module.refused
        result.just_in_time = _one_line(why)
    if not isinstance(error, str):
        result.errors[str(dtype).removeprefix("torch.")] = error


def compare(
    row: Row, model: torch.nn.Module, rewritten: torch.nn.Module, dtype: torch.dtype
) -> tuple[float, float] | str:
    """(greatest error of the rewritten model, bound) against the model in float64, or why not.

    The weights and inputs of the reference are those of ``dtype``, widened.  The bound is the
    greater of twice the original's own error and 4 eps of the greatest value.  Values that are not
    finite in the reference are left out.
    """
    _, args, kwargs = made(row, dtype)
    # With gradients on: the inference path of nn.TransformerEncoder gives zeros for padded rows, which
    # the captured graph, like training, does not.
    with torch.enable_grad():
        original = floats(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        again = floats(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        if not all(
            torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(original, again, strict=True)
        ):
            return "the model draws random numbers"  # masked autoencoders
        got = floats(rewritten(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        reference = _reference(row, dtype)
    if reference is None:
        return "the model has types of its own inside and does not run in float64"
    assert len(reference) == len(original) == len(got), "the rewritten model has other outputs"
    worst = (0.0, 0.0)
    for ref, own, new in zip(reference, original, got, strict=True):
        fine = ref.isfinite() & own.isfinite()
        if not fine.any():
            continue
        ref, own, new = (t[fine].double() for t in (ref, own, new))
        eps = torch.finfo(dtype).eps
        bound = max(2 * (own - ref).abs().max().item(), 4 * eps * ref.abs().max().item())
        error = (new - ref).abs().max().item()
        error = float("inf") if error != error else error
        if worst[1] == 0.0 or error * worst[1] > worst[0] * bound:
            worst = (error, bound)
    return worst


def _reference(row: Row, dtype: torch.dtype) -> list[torch.Tensor] | None:
    """What the model gives in float64; in float32 where it fixes that type inside (its error is
    far below that of bfloat16); None where neither is wider than ``dtype``."""
    for wide in (torch.float64, torch.float32):
        if torch.finfo(wide).bits <= torch.finfo(dtype).bits:
            return None
        model, args, kwargs = made(row, dtype)
        args, kwargs = cast((args, kwargs), wide)
        try:
            return floats(model.to(wide)(*args, **kwargs))
        except RuntimeError:  # operands of two types
            continue
    return None


def floats(output: Any) -> list[torch.Tensor]:
    """Floating tensors of an output, in order."""
    leaves = pytree.tree_leaves(output)
    return [t.detach() for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of a tree in another type, copied."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()

    return pytree.tree_map_only(torch.Tensor, move, values)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
