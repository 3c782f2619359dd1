"""Rows of torch.nn: multi-head attention and transformer layers with every option of their
signature."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.rows import Row

WIDTH, HEADS, LENGTH = 32, 4, 7


class First(nn.Module):
    """Calls a module with fixed options and gives the first of its outputs."""

    def __init__(self, inner: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner = inner
        self.options = {n: v for n, v in options.items() if not isinstance(v, Tensor)}
        self.masks = [n for n in options if n not in self.options]
        for name in self.masks:  # buffers follow the type of the model
            self.register_buffer(name, options[name])

    def forward(self, *args: Tensor) -> Tensor:
        out = self.inner(*args, **self.options, **{n: getattr(self, n) for n in self.masks})
        return out[0] if isinstance(out, tuple) else out


def _causal() -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(LENGTH)


def _padding() -> Tensor:
    return torch.arange(LENGTH) >= torch.tensor([[LENGTH], [LENGTH - 2]])


_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"attn_mask": _causal()},
    "is_causal": {"attn_mask": _causal(), "is_causal": True},
    "bool_mask": {"attn_mask": _causal() < 0},
    "padding": {"key_padding_mask": _padding()},
    "causal_padding": {"attn_mask": _causal() < 0, "key_padding_mask": _padding()},
}
_MAKES: dict[str, dict[str, Any]] = {
    "packed": {},
    "length_first": {"batch_first": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "no_bias": {"bias": False},
    "other_widths": {"kdim": 24, "vdim": 20},
}


def _attention(make: str, call: str, spelling: str) -> Any:
    options = {"batch_first": True, **_MAKES[make]}
    model = nn.MultiheadAttention(WIDTH, HEADS, **options)
    widths = (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    shape = (2, LENGTH) if options["batch_first"] else (LENGTH, 2)
    args = tuple(torch.randn(*shape, w) for w in widths)
    if make in ("packed", "no_bias") and call == "plain":
        args = (args[0],) * 3  # the fast path of eager inference wants one tensor
    return First(model, need_weights=spelling == "weights", **_CALLS[call]), args, {}


def _layers(kind: str, options: dict[str, Any], call: dict[str, Any], sources: int) -> Any:
    layer = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}[kind]
    stack = {"encoder": nn.TransformerEncoder, "decoder": nn.TransformerDecoder}[kind]
    options = {"dim_feedforward": 64, "batch_first": True, **options}
    model = First(stack(layer(WIDTH, HEADS, **options), 2), **call)
    return model, tuple(torch.randn(2, LENGTH, WIDTH) for _ in range(sources)), {}


def _transformer(call: dict[str, Any]) -> Any:
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 64, batch_first=True)
    return First(model, **call), tuple(torch.randn(2, LENGTH, WIDTH) for _ in range(2)), {}


def rows() -> Iterator[Row]:
    """Every way to make and to call the attention of ``torch.nn``."""
    for make in _MAKES:
        for call in _CALLS:
            for spelling in ("sdpa", "weights"):
                name = f"MultiheadAttention.{make}.{call}"
                yield Row("torch", name, spelling, partial(_attention, make, call, spelling))
    norms = {"post_norm": {}, "pre_norm": {"norm_first": True}, "gelu": {"activation": "gelu"}}
    for name, options in norms.items():
        for call, masks in {"plain": {}, "causal": {"mask": _causal()},
                            "nested": {"src_key_padding_mask": _padding()}}.items():  # fmt: skip
            yield Row("torch", f"TransformerEncoder.{name}.{call}", "sdpa",
                      partial(_layers, "encoder", options, masks, 1))  # fmt: skip
        for call, masks in {
            "plain": {},
            "causal": {"tgt_mask": _causal()},
            "padding": {"memory_key_padding_mask": _padding()},
        }.items():
            yield Row("torch", f"TransformerDecoder.{name}.{call}", "sdpa",
                      partial(_layers, "decoder", options, masks, 2))  # fmt: skip
    for call, masks in {
        "plain": {},
        "causal": {"tgt_mask": _causal(), "tgt_is_causal": True},
    }.items():
        yield Row("torch", f"Transformer.{call}", "sdpa", partial(_transformer, masks))
