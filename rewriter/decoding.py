"""The forward of a decoder that goes on from a cache: past keys and values in, present ones out.

A decoder of transformers returns its keys and values on request and takes them at the next call.
The inputs made here show one such call, in the middle of a text, so that capture sees the keys of
the past and of the new tokens as tensors of their own lengths.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attn_rewrite.capture import Captured, capture_model
from attn_rewrite.containers import make_known
from attn_rewrite.encoded import has_encoder, step_of
from attn_rewrite.errors import PolicyError

PAST = "past_key_values"
_SLICED = ("position_ids", "token_type_ids")
_NEEDED = 4  # two tokens of the past and two new ones: a length of 1 cannot be dynamic


def capture_step(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """Capture ``model`` at a step that goes on from a past; raises as `step_inputs` and
    `capture_model` do.  Behind an encoder the step takes its keys and values (`encoded`)."""
    if has_encoder(model):
        given = _bound(model, args, kwargs)
        _refuse(model, _why_not(model, given, "decoder_input_ids"))
        encoded = step_of(model, given)
        with encoded.hooked(model):
            return capture_model(model, (), encoded.inputs)
    step = step_inputs(model, args, kwargs)
    handle = model.register_forward_pre_hook(_one_past, with_kwargs=True)
    try:
        return capture_model(model, (), step)
    finally:
        handle.remove()


def _one_past(_model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    """Say while tracing that all layers have one past, and that everything has one batch.

    A mask made from the past of the first layer fits the keys of the next one only where both
    lengths are known to be equal.
    """
    first, *others = pytree.tree_leaves(kwargs[PAST])
    equal = [tensor.shape[2] == first.shape[2] for tensor in others]
    tensors = [v for v in (*others, *kwargs.values()) if isinstance(v, torch.Tensor)]
    for fact in (*equal, *(v.shape[0] == first.shape[0] for v in tensors)):
        torch._check(fact)  # type: ignore[no-untyped-call]


def step_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Keyword arguments of a call that goes on where the first half of the example ended.

    The past is computed by ``model`` from the first half of ``input_ids`` [B, L]; the call has the
    rest, the whole ``attention_mask`` where one was given, and ``use_cache=True``.  Where a mask
    was given and the model's answer depends on where a text begins (learned positions), it also has
    ``position_ids`` [B, L]: under padding on the left only the caller can say them.  Raises
    `PolicyError` where the model has no such call, or the example is too short for one.
    """
    given = _bound(model, args, kwargs)
    _refuse(model, _why_not(model, given, "input_ids"))
    if has_encoder(model):
        _refuse(model, "its decoder stands behind an encoder, whose step is another")
    if _wants_positions(model, inspect.signature(model.forward).parameters, given):
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    half = given["input_ids"].shape[1] // 2
    first, rest = _split(model, given, half)
    return {**rest, PAST: _past(model, first), "use_cache": True}


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    signature = inspect.signature(model.forward)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def _refuse(model: nn.Module, reason: str | None) -> None:
    if reason is not None:
        raise PolicyError(
            f"{type(model).__name__} cannot be exported with its cache: {reason}; leave the cache "
            "out, or name a decoder-only or an encoder-decoder language model"
        )


def _why_not(model: nn.Module, given: Mapping[str, Any], tokens: str) -> str | None:
    parameters, ids = inspect.signature(model.forward).parameters, given.get(tokens)
    if PAST not in parameters or "use_cache" not in parameters:
        return f"its forward takes no {PAST}"
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return f"its example has no {tokens} of [batch, length]"
    if ids.shape[1] < _NEEDED:
        return f"its example has {ids.shape[1]} {tokens}, expected at least {_NEEDED}"
    return None


def _wants_positions(
    model: nn.Module, parameters: Mapping[str, Any], given: Mapping[str, Any]
) -> bool:
    """Whether a text that begins at position 1 gives other numbers than one that begins at 0.

    Rotary embeddings do not: only distances count.  A model is asked rather than its source, since
    positions are spelled in many ways.
    """
    mask = given.get("attention_mask")
    if "position_ids" not in parameters or given.get("position_ids") is not None:
        return False
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return False
    start = torch.arange(mask.shape[1] - 1, device=mask.device)[None]  # none beyond the last
    call = {n: v for n, v in given.items() if n not in ("use_cache", PAST, "attention_mask")}
    call["input_ids"] = call["input_ids"][:, :-1]
    with torch.no_grad():
        here, there = (
            pytree.tree_leaves(model(**call, position_ids=start + by, use_cache=False))[0]
            for by in (0, 1)
        )
    # Far above what the rounding of rotated keys may change, far below what another position does.
    slack = torch.finfo(here.dtype).eps ** 0.5
    return bool((here - there).abs().max() > slack * here.abs().max())


def _split(
    model: nn.Module, given: Mapping[str, Any], half: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The example as two calls: its first ``half`` tokens, and those after them."""
    first: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("use_cache", PAST):
            continue
        if not isinstance(value, torch.Tensor):
            first[name] = rest[name] = value
        elif name == "attention_mask" and value.dim() == 2:
            first[name], rest[name] = value[:, :half], value
        elif name == "input_ids" or name in _SLICED:
            first[name], rest[name] = value[..., :half], value[..., half:].clone()
        else:
            raise PolicyError(
                f"{type(model).__name__} cannot be exported with its cache: nothing is known of "
                f"what {name} is at a later step; leave it out of the example"
            )
    return first, rest


def _past(model: nn.Module, first: dict[str, Any]) -> Any:
    """The cache after the call ``first``: whole keys and values of every layer.

    A cache made without a configuration keeps all tokens, in layers with a window too.
    """
    from transformers import DynamicCache

    with torch.no_grad():
        made = model(**first, **{PAST: DynamicCache(), "use_cache": True})
    cache = made.get(PAST) if isinstance(made, Mapping) else None
    if cache is None:
        raise PolicyError(
            f"{type(model).__name__} cannot be exported with its cache: it returns no {PAST},"
            " expected a decoder-only model that does; leave the cache out"
        )
    layers = getattr(cache, "layers", ())
    odd = [type(layer).__name__ for layer in layers if type(layer).__name__ != "DynamicLayer"]
    if not isinstance(cache, DynamicCache) or odd or not layers:
        kind = odd[0] if odd else type(cache).__name__
        raise PolicyError(
            f"{type(model).__name__} cannot be exported with its cache: it keeps a {kind}, expected"
            " keys and values of every token; leave the cache out"
        )
    make_known(cache)
    return cache
