"""A recorder of ONNX nodes: names unique over nested graphs, constants shared and kept outside.

Values carry no Python type, so whoever emits keeps track of element types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Recorder:
    """Collects nodes of standard operators under a name prefix.

    A recorder made by `inner` records the body of a control-flow operator: it may use every value
    of the outer one, and its constants are recorded outside, once.
    """

    def __init__(self, prefix: str, opset: int, outer: Recorder | None = None) -> None:
        self.prefix = prefix
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self._outer = outer
        self._count: list[int] = outer._count if outer else [0]
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def inner(self) -> Recorder:
        """A recorder for a body nested in this one."""
        return Recorder(self.prefix, self.opset, self)

    def op(
        self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Record one node with one output."""
        return self.ops(kind, *inputs, count=1, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, count: int, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Record one node with ``count`` outputs."""
        self._count[0] += 1
        name = f"{self.prefix}/{self._count[0]}_{kind}"
        node = ir.node(
            kind, list(inputs), attributes or None, domain=domain, name=name, num_outputs=count
        )
        for i, value in enumerate(node.outputs):
            value.name = f"{name}_out" if i == 0 else f"{name}_out_{i}"
        self.nodes.append(node)
        return tuple(node.outputs)

    def constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        """A constant of any type and shape."""
        if self._outer is not None:
            return self._outer.constant(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=ir.tensor(array))
        return self._constants[key]

    def integers(self, values: Sequence[int] | int) -> ir.Value:
        """An int64 constant: a vector, or a scalar for a plain int."""
        return self.constant(np.array(values, dtype=np.int64))

    def number(self, value: float, dtype: ir.DataType) -> ir.Value:
        """A floating-point scalar."""
        return self.constant(np.array(value, dtype=dtype.numpy()))

    def extent(self, tensor: ir.Value, axis: int) -> ir.Value:
        """The run-time extent of an axis: an int64 vector of one element."""
        if axis == -1:
            return self.op("Shape", tensor, start=-1)
        return self.op("Shape", tensor, start=axis, end=axis + 1)

    def scalar(self, vector: ir.Value) -> ir.Value:
        """A vector of one element as a scalar."""
        return self.op("Squeeze", vector, self.integers([0]))

    def counting(self, length: ir.Value) -> ir.Value:
        """0, 1 ... length - 1 (``length`` an int64 vector of one element)."""
        return self.op("Range", self.integers(0), self.scalar(length), self.integers(1))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` in another element type."""
        return self.op("Cast", value, to=int(dtype))

    def masked(self, keep: ir.Value, score: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``score`` where kept, else -inf."""
        return self.op("Where", keep, score, self.number(-math.inf, dtype))

    def nonempty(self, keep: ir.Value, dtype: ir.DataType) -> ir.Value:
        """1.0 for the rows of a mask that keep a key, else 0.0; shape [..., 1]."""
        return self.op("ReduceMax", self.cast(keep, dtype), self.integers([-1]), keepdims=1)

    def zero_where_empty(self, keep: ir.Value, out: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``out`` with 0 in the rows that keep no key (a softmax over -inf alone is NaN)."""
        some = self.op("Greater", self.nonempty(keep, dtype), self.number(0.0, dtype))
        return self.op("Where", some, out, self.number(0.0, dtype))
