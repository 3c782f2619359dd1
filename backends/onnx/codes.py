"""A cache of 8-bit codes: scales by measuring, the change of the graph, and what its error is.

Keys and values have one scale per head and channel, fixed in the file: the largest magnitude in the
example, over 127.  A later number beyond it is cut to the largest code.  Everything that attention
reads is what the codes stand for, new tokens included, as in ``GroupQueryAttention`` with
``PER_CHANNEL`` scales; KIVI (Liu et al. 2024) codes keys the same way, in groups of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from attn_rewrite.backends.onnx.cached import Cache, joined, remember_codes
from attn_rewrite.backends.onnx.graph import Recorder
from attn_rewrite.backends.onnx.names import input_name, is_past
from attn_rewrite.backends.onnx.repeats import source_of
from attn_rewrite.errors import LowerError, VerifyError
from attn_rewrite.site import Refusal

Arrays = Mapping[str, np.ndarray[Any, Any]]
LARGEST = 127


@dataclass(frozen=True, eq=False)
class Codes:
    """The scale [1, hkv, 1, d] of every past input, by its name in the file."""

    scales: Arrays

    @classmethod
    def of(cls, present: Arrays) -> Codes:
        """Scales that just hold ``present`` (``present.0.key`` [b, hkv, t, d] and so on)."""
        found = {}
        for name, array in present.items():
            if name.startswith("present."):
                top = np.abs(array.astype(np.float32)).max((0, 2), keepdims=True)
                found[past_of(name)] = np.maximum(top, 1e-6) / LARGEST
        return cls(found)

    def to_text(self) -> str:
        """JSON for the metadata of a file: nested lists of a head's channels."""
        return json.dumps({n: a[0, :, 0].tolist() for n, a in self.scales.items()})

    @classmethod
    def from_text(cls, text: str) -> Codes:
        """The inverse of `to_text`."""
        lists = json.loads(text)
        return cls({n: np.array(x, np.float32)[None, :, None] for n, x in lists.items()})

    def encoded(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """``inputs`` with codes for the past."""
        return {
            n: _codes(a / self.scales[n].astype(a.dtype)) if n in self.scales else a
            for n, a in inputs.items()
        }

    def numbers(self, arrays: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """What the codes in ``arrays`` (past or present) stand for, in float32."""
        return {
            n: a.astype(np.float32) * self.scales[past_of(n)] if past_of(n) in self.scales else a
            for n, a in arrays.items()
        }

    def approximation(self, got: Arrays, exact: Arrays) -> dict[str, float]:
        """Relative root mean square of what the codes change in every output that is not codes."""
        found = {}
        for name, array in exact.items():
            if past_of(name) not in self.scales and array.dtype.kind == "f":
                gap = np.square(got[name].astype(np.float64) - array).sum()
                found[name] = float(np.sqrt(gap / max(np.square(array, dtype="f8").sum(), 1e-300)))
        return found

    def check(self, codes: Arrays, exact: Arrays, slack: Mapping[str, float]) -> dict[str, float]:
        """How far every code is from its number, in steps beyond the half that rounding takes.

        ``exact`` are the numbers in float64, ``slack`` how far the file's own may be from them.
        Raises `VerifyError` where a code is not the nearest one.
        """
        errors = {}
        for name, array in exact.items():
            scale = self.scales[past_of(name)].astype(np.float64)
            wanted = np.clip(array / scale, -128, LARGEST)
            errors[name] = float(np.max(np.abs(codes[name] - wanted), initial=0.0))
            allowed = 0.5 + slack[name] / float(scale.min())
            if not errors[name] <= allowed:
                raise VerifyError(
                    f"codes {name!r} are {errors[name]:.3g} steps off, allowed {allowed:.3g}; the "
                    "export is wrong, please report it with the model."
                )
        return errors


def past_of(name: str) -> str:
    """``present.0.key`` as the input that takes it at the next call."""
    head, _, rest = name.partition(".")
    return f"past_key_values.{rest}" if head == "present" else name


def _codes(steps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    codes: np.ndarray[Any, Any] = np.clip(np.round(steps), -128, LARGEST).astype(np.int8)
    return codes


def quantise_cache(model: ir.Model, codes: Codes, opset: int) -> None:
    """Make every past input and present output of ``model`` codes, before sites are expanded.

    Raises `LowerError` where a past is used for anything but to append to it.
    """
    for index, past in enumerate(model.graph.inputs):
        name = input_name(past.name or "")
        if is_past(name):  # keys of an encoder stay what they are
            _quantise(model, past, codes.scales[name], Recorder(f"cache_{index}", opset))


def _quantise(model: ir.Model, past: ir.Value, scale: np.ndarray[Any, Any], r: Recorder) -> None:
    append = _append_to(past)
    old, new, dtype = append.outputs[0], append.inputs[1], past.dtype
    assert new is not None
    assert dtype is not None
    held = r.constant(scale.astype(dtype.numpy()))
    held.shape, held.dtype = ir.Shape(scale.shape), dtype
    present, numbers = joined(r, past, new, held, dtype)
    present.shape = numbers.shape = old.shape
    present.dtype, numbers.dtype = ir.DataType.INT8, dtype
    past.dtype = ir.DataType.INT8
    remember_codes(numbers, Cache(past, new, present, held))
    for position, value in enumerate(model.graph.outputs):
        if source_of(value) is old:
            model.graph.outputs[position] = present
    old.replace_all_uses_with(numbers)
    model.graph.insert_before(append, r.nodes)


def _append_to(past: ir.Value) -> ir.Node:
    """The one Concat that reads ``past``; what only forwards it is taken out."""
    forwards = [n for n in past.consumers() if n.op_type == "Identity"]
    while forwards:
        held = forwards.pop().outputs[0]
        forwards += [n for n in held.consumers() if n.op_type == "Identity"]
        held.replace_all_uses_with(past)
    users = [n for n in past.consumers() if n.op_type not in ("Identity", "Shape")]
    if len(users) != 1 or users[0].op_type != "Concat":
        what = ", ".join(sorted({n.op_type for n in users})) or "nothing"
        reason = f"{past.name} is read by {what}, and codes can only be appended to"
        raise LowerError(
            f"ONNX: an int8 cache: {reason}; export it with cache='float'.",
            [Refusal("onnx-cache", reason)],
        )
    return users[0]
