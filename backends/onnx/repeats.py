"""Keys and values before their heads were repeated, read from the graph that repeats them.

A decoder with fewer key heads than query heads often writes ``repeat_kv``: a new axis, expanded and
merged into the heads.  What stands before it holds the same numbers once.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

Sizes = tuple[object, ...]


def _sizes(value: ir.Value | None) -> Sizes | None:
    return None if value is None or value.shape is None else tuple(str(d) for d in value.shape)


def _same(a: Sizes | None, b: Sizes | None) -> bool:
    """Equal extents; one may be written differently: equal counts of elements make it equal too."""
    if a is None or b is None or len(a) != len(b):
        return False
    return sum(x != y for x, y in zip(a, b, strict=True)) <= 1


def _is_nothing(node: ir.Node) -> bool:
    """Whether a node gives its first input as it is."""
    if node.op_type == "Identity":
        return True
    before, after = _sizes(node.inputs[0]), _sizes(node.outputs[0])
    if node.op_type == "Reshape":
        return _same(before, after)
    # A slice of the same extents has left nothing out; backwards it would be another order.
    return node.op_type == "Slice" and before is not None and before == after and _forward(node)


def _forward(node: ir.Node) -> bool:
    if len(node.inputs) < 5 or node.inputs[4] is None:
        return True
    steps = ir.convenience.get_const_tensor(node.inputs[4])
    return steps is not None and bool((steps.numpy() > 0).all())


def source_of(value: ir.Value) -> ir.Value:
    """The value before everything that changes nothing."""
    while True:
        before = _one_back(value) or _there_and_back(value)
        if before is None:
            return value
        value = before


def _one_back(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    if node is None or node.domain or not node.inputs or not _is_nothing(node):
        return None
    return node.inputs[0]


def _there_and_back(value: ir.Value) -> ir.Value | None:
    """The value before a row of reshapes that end in the shape they started from."""
    before = value
    node = before.producer()
    while node is not None and node.op_type in ("Reshape", "Identity") and node.inputs[0]:
        before = node.inputs[0]
        if _same(_sizes(before), _sizes(value)):
            return before
        node = before.producer()
    return None


def before_repeating(value: ir.Value) -> tuple[ir.Value, int]:
    """[b, hkv, t, d] and g where ``value`` [b, hkv * g, t, d] is it with every head g times in a
    row; ``value`` and 1 where it is not."""
    merged = source_of(value)
    node = merged.producer()
    if node is None or node.op_type != "Reshape" or node.inputs[0] is None:
        return value, 1
    spread = source_of(node.inputs[0])
    expand = spread.producer()
    wide, sizes = _sizes(spread), _sizes(merged)
    if expand is None or expand.op_type != "Expand" or wide is None or sizes is None:
        return value, 1
    narrow = source_of(expand.inputs[0]) if expand.inputs[0] is not None else None
    unsqueeze = None if narrow is None else narrow.producer()
    if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or not _merges(wide, sizes):
        return value, 1
    inner = unsqueeze.inputs[0]
    if inner is None or _sizes(narrow) != (*wide[:2], "1", *wide[3:]):
        return value, 1
    found = source_of(inner)
    if not _same(_sizes(inner), (*wide[:2], *wide[3:])) or _sizes(found) is None:
        return value, 1
    return found, int(str(wide[2]))


def _merges(wide: Sizes, merged: Sizes) -> bool:
    """[b, h, g, t, d] to [b, h * g, t, d], with fixed h and g."""
    if len(wide) != 5 or len(merged) != 4:
        return False
    numbers = [str(n) for n in (wide[1], wide[2], merged[1])]
    if not all(n.isdigit() for n in numbers):
        return False
    heads, group, together = map(int, numbers)
    return together == heads * group and _same((wide[0], *wide[3:]), (merged[0], *merged[2:]))


def keys_once(inputs: Sequence[ir.Value]) -> tuple[list[ir.Value], int]:
    """q, k, v and the reads with k and v before they were repeated, and how often they were."""
    q, k, v, *rest = inputs
    (k_once, times), (v_once, again) = before_repeating(k), before_repeating(v)
    if times == 1 or times != again:
        return list(inputs), 1
    return [q, k_once, v_once, *rest], times
