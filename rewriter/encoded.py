"""The later steps of a decoder behind an encoder, where the encoder does not run any more.

Cross attention makes its keys and values from the encoder's states once; later steps find them in
the cache.  What is left of the states is their length, so that a captured step gets a stand-in of
zeros, made from the cache: the example shows that the model's answer is the same with it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attn_rewrite.containers import make_known
from attn_rewrite.errors import PolicyError

PAST, STATES = "past_key_values", "encoder_outputs"
_SLICED = ("decoder_input_ids", "decoder_position_ids")
_MASK, _OWN_MASK = "attention_mask", "decoder_attention_mask"


def has_encoder(model: nn.Module) -> bool:
    """Whether transformers calls ``model`` an encoder with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


@dataclass(frozen=True, eq=False)
class EncodedStep:
    """Keyword arguments of a call that goes on from a past, without the encoder's input.

    ``inputs`` holds ``decoder_input_ids`` [B, L], an `EncoderDecoderCache` and the masks that were
    given; ``width`` and ``dtype`` are those of the encoder's states [B, T, width].
    """

    inputs: dict[str, Any]
    width: int = field(repr=False)
    dtype: torch.dtype = field(repr=False)

    @contextlib.contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """``model`` takes these inputs alone, and returns of its cache what a call changes."""
        before = model.register_forward_pre_hook(self._with_stand_in, with_kwargs=True)
        after = model.register_forward_hook(_own_results)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _with_stand_in(
        self, _model: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The call with a stand-in for the encoder's states, and what is known of its sizes."""
        cache = kwargs[PAST]
        own, crossed = map(_tensors, (cache.self_attention_cache, cache.cross_attention_cache))
        lengths = [t.shape[2] for t in crossed]
        mask = kwargs.get(_MASK)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            lengths.append(mask.shape[1])
        tensors = [v for v in (*own, *crossed, *kwargs.values()) if isinstance(v, torch.Tensor)]
        for fact in (
            *(t.shape[2] == own[0].shape[2] for t in own),
            *(n == lengths[0] for n in lengths),
            *(t.shape[0] == own[0].shape[0] for t in tensors),
        ):
            torch._check(fact)  # type: ignore[no-untyped-call]
        batch, length = crossed[0].shape[0], crossed[0].shape[2]
        states = crossed[0].new_zeros(batch, length, self.width, dtype=self.dtype)
        return args, {**kwargs, STATES: _outputs(states)}


def step_of(model: nn.Module, given: Mapping[str, Any]) -> EncodedStep:
    """A call that goes on where the first half of the example's decoder tokens ended.

    Raises `PolicyError` where nothing is known of an input at a later step, or where the model
    reads the encoder's states beside its cache.
    """
    half = given["decoder_input_ids"].shape[1] // 2
    first, rest = _split(model, given, half)
    cache, states = _past(model, first)
    step = {**rest, PAST: cache, "use_cache": True}
    found = EncodedStep(step, states.shape[-1], states.dtype)
    with torch.no_grad():
        real = model(**copy.deepcopy(step), **{STATES: _outputs(states)})
        with found.hooked(model):
            stood = model(**copy.deepcopy(step))
    # In the order of fields, what predicts tokens comes first.
    if not torch.equal(pytree.tree_leaves(real)[0], pytree.tree_leaves(stood)[0]):
        raise _refused(model, "a later step reads the encoder's states, not only its keys")
    make_known(cache)
    return found


def _outputs(states: torch.Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)


def _own_results(_model: nn.Module, _args: Any, output: Any) -> Any:
    """The output without what only says again what the encoder said."""
    kept = {n: v for n, v in output.items() if not n.startswith("encoder_")}
    kept[PAST] = kept[PAST].self_attention_cache
    return type(output)(**kept)


def _tensors(cache: Any) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def _refused(model: nn.Module, reason: str) -> PolicyError:
    return PolicyError(
        f"{type(model).__name__} cannot be exported with its cache: {reason}; leave the cache out"
    )


def _split(
    model: nn.Module, given: Mapping[str, Any], half: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The example as two calls: the encoder and ``half`` the decoder's tokens, and the others."""
    first: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    encoded = getattr(model, "main_input_name", "input_ids")
    for name, value in given.items():
        if name in ("use_cache", PAST):
            continue
        if name == encoded:
            first[name] = value
        elif name == _MASK or not isinstance(value, torch.Tensor):
            first[name] = rest[name] = value
        elif name == _OWN_MASK:
            first[name], rest[name] = value[:, :half], value
        elif name in _SLICED:
            first[name], rest[name] = value[..., :half], value[..., half:].clone()
        else:
            reason = f"nothing is known of what {name} is at a later step, so leave it out of the"
            raise _refused(model, f"{reason} example")
    return first, rest


def _past(model: nn.Module, first: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """The cache after the call ``first``, and the states of the encoder."""
    from transformers import DynamicCache, EncoderDecoderCache

    with torch.no_grad():
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        made = model(**first, **{PAST: cache, "use_cache": True})
    states = made.get("encoder_last_hidden_state") if isinstance(made, Mapping) else None
    held = made.get(PAST) if isinstance(made, Mapping) else None
    if not isinstance(states, torch.Tensor) or not isinstance(held, EncoderDecoderCache):
        raise _refused(model, "it returns no cache of both attentions with the encoder's states")
    caches = (held.self_attention_cache, held.cross_attention_cache)
    kinds = {type(layer).__name__ for c in caches for layer in c.layers}
    if kinds != {"DynamicLayer"} or len({len(c.layers) for c in caches}) > 1:
        raise _refused(
            model, f"it keeps {', '.join(sorted(kinds))}, expected keys and values of every token"
        )
    return held, states
