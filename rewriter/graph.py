"""FX helpers: reading nodes, building nodes, and arranging tensors between layouts.

A *builder* has one method, ``call(op, *args, **kwargs)``: `GraphBuilder` inserts FX nodes with
their fake values, `EagerBuilder` runs the operator at once.  Whatever is written against a builder
runs both in the host graph and in verification.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg

from attn_rewrite.site import Factor, Operand

aten = torch.ops.aten

# Order of the axes in every canonical layout; g (query heads of one key head) sits inside h.
ROLE_ORDER = ("b", "h", "g", "q", "kv", "d", "f")

# Metadata of placeholders that are parameters of the model (graphs captured just in time).
PARAMETER = "attn_rewrite_parameter"

# Same elements, same shape: nothing to do in either direction.
TRANSPARENT = frozenset(
    [
        "contiguous",
        "clone",
        "alias",
        "detach",
        "detach_",
        "lift_fresh_copy",
        "_to_copy",
        "to",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "requires_grad_",
        "native_dropout",
        "feature_dropout",
    ]
)


class Builder(Protocol):
    """Where operators go: into a graph, or straight to execution."""

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Apply ``op``; the value is a node or a tensor."""


class EagerBuilder:
    """Runs operators at once on real tensors."""

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``op``."""
        return op(*args, **kwargs)


class GraphBuilder:
    """Inserts operators into a graph before ``point``, with fake values; equal calls are made once.

    ``site`` is written into the metadata of the nodes so that dumps and exporters can tell whose
    they are.
    """

    def __init__(self, graph: fx.Graph, memo: dict[Any, fx.Node] | None = None) -> None:
        self.graph = graph
        self.memo: dict[Any, fx.Node] = {} if memo is None else memo
        self.point: fx.Node | None = None
        self.meta: dict[str, Any] = {}

    def at(self, point: fx.Node, **meta: Any) -> GraphBuilder:
        """Insert before ``point`` from now on; ``meta`` is copied to every node."""
        self.point, self.meta = point, meta
        return self

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Insert ``op``; pure Python integers are computed, not inserted."""
        if op in _SCALAR_OPS and not any(isinstance(a, fx.Node) for a in args):
            return op(*args, **kwargs)
        key = (op, _hashable(args), _hashable(tuple(sorted(kwargs.items()))))
        if key in self.memo:
            return self.memo[key]
        assert self.point is not None
        with self.graph.inserting_before(self.point):
            node = self.graph.call_function(op, args, kwargs)
        node.meta.update(self.meta)
        node.meta["val"] = self.memo_value(node)
        self.memo[key] = node
        return node

    def memo_value(self, node: fx.Node) -> Any:
        """The fake value of a new node from those of its arguments."""
        args, kwargs = map_arg((node.args, node.kwargs), value_of)
        assert callable(node.target)
        # Without the mode an operator that takes no tensor (arange) would fix a symbolic size, and
        # without the dispatcher one that is made of others in C++ (matmul, in PyTorch 2.11).
        with torch.no_grad(), enable_python_dispatcher(), self.fake_mode or nullcontext():
            return node.target(*args, **kwargs)

    @cached_property
    def fake_mode(self) -> FakeTensorMode | None:
        """The mode the graph was captured in."""
        values = (n.meta.get("val") for n in self.graph.nodes)
        return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


_SCALAR_OPS = {operator.mul, operator.floordiv, operator.add, operator.sub}


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, (bool, int, float)):
        return (type(value).__name__, value)
    return value


def value_of(node: fx.Node) -> Any:
    """The fake value of a node (`KeyError` if the graph was not captured with values)."""
    return node.meta["val"]


def is_call(node: Any, *names: str) -> bool:
    """True if ``node`` calls an aten operator with one of the names, any overload."""
    return isinstance(node, fx.Node) and op_name(node) in names


def through(node: Any, *names: str) -> Any:
    """Skip operators of ``names``, but no cast to whole numbers: that changes the values."""
    while is_call(node, *names) and not truncates(node):
        node = node.args[0]
    return node


def truncates(node: fx.Node) -> bool:
    """True where floating point goes in and integers or truth values come out."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(source) or not is_tensor(node):
        return False
    whole = not value_of(node).dtype.is_floating_point
    return whole and value_of(source).dtype.is_floating_point


def rounds(node: Any) -> bool:
    """True for a division that rounds its quotient down or towards zero."""
    return is_call(node, "div", "div_") and node.kwargs.get("rounding_mode") is not None


def inverted(node: Any) -> Any:
    """``x`` if ``node`` is ``1 / x`` in any spelling, else None."""
    if is_call(node, "mul") and node.args[1] == 1:
        node = node.args[0]
    if is_call(node, "reciprocal"):
        return node.args[0]
    if is_call(node, "pow") and node.args[1] == -1:
        return node.args[0]
    divides = is_call(node, "div") and not rounds(node)
    return node.args[1] if divides and node.args[0] == 1 else None


def op_name(node: fx.Node) -> str:
    """``"softmax"`` for any overload of ``aten::softmax``; other namespaces keep their prefix."""
    if node.op != "call_function":
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        space, _, name = target._schema.name.partition("::")
        return name if space == "aten" else f"{space}::{name}"
    return getattr(target, "__name__", str(target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operator call by schema name, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    out: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args):
            out[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            out[argument.name] = node.kwargs[argument.name]
        else:
            out[argument.name] = argument.default_value if argument.has_default_value() else None
    return out


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Shape of the node's fake value."""
    return tuple(value_of(node).shape)


def is_tensor(node: Any) -> bool:
    """True for a node whose value is a single tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_parameter(node: fx.Node) -> bool:
    """True for a node that reads a parameter or buffer of the model."""
    return node.op == "get_attr" or bool(node.meta.get(PARAMETER))


def module_path(node: fx.Node) -> str:
    """Path of the innermost module the node was traced in; empty for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"^L\['[^']*'\]\.?|^L__self__\.?", "", path)  # the frame's name for itself
    return re.sub(r"_modules\['([^']*)'\]|\[(\d+)\]|\['([^']*)'\]", _path_part, path).strip(".")


def _path_part(match: re.Match[str]) -> str:
    """``_modules['a']``, ``[0]`` and ``['a']`` as path components."""
    name = next(g for g in match.groups() if g is not None)
    return name if match.group(1) is not None else f".{name}"


def source_line(node: fx.Node) -> str | None:
    """The user's ``file:line, function`` nearest to the node, library frames of torch left out."""
    best = None
    for line in (node.meta.get("stack_trace") or "").splitlines():
        line = line.strip()
        if line.startswith("File ") and "/torch/" not in line:
            parts = line.replace('"', "").split(", ")
            if len(parts) >= 3:
                file, number, function = parts[0][5:], parts[1][5:], parts[2]
                best = f"{file}:{number}, {function.removeprefix('in ')}"
    return best


# Operators that read the shape and type of their first argument, not its values.
_SHAPE_ONLY = frozenset(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "sym_size sym_numel sym_stride".split()
)


def live_users(node: fx.Node) -> list[fx.Node]:
    """Users that matter: those that read only the shape, metadata assertions and nodes without
    effect or use are left out."""
    return [u for u in node.users if not _reads_shape(u, node) and not _is_dead(u)]


def _reads_shape(user: fx.Node, node: fx.Node) -> bool:
    return (
        op_name(user) in _SHAPE_ONLY
        and user.all_input_nodes.count(node) == 1
        and user.args[0] is node
    )


# Functions that open and close a level of `torch.vmap`, where a captured graph has one, and what is
# called before.
LEVEL_OPENS, LEVEL_CLOSES = "_vmap_increment_nesting", "_vmap_decrement_nesting"
LEVEL_PRELUDE = "lazy_load_decompositions"
LEVELS = frozenset({LEVEL_OPENS, LEVEL_CLOSES, LEVEL_PRELUDE})


def has_effect(node: fx.Node) -> bool:
    """True for a node that must stay although nothing reads it."""
    return node.is_impure() or op_name(node) in LEVELS


# Something that is not used after so many nodes counts as used: looking further would make every
# question about users as long as the graph.
_DEAD_NODES = 64


def _is_dead(node: fx.Node) -> bool:
    """True if nothing that follows from ``node`` is an output or has an effect."""
    seen, queue = {node}, [node]
    while queue:
        here = queue.pop()
        if op_name(here) in ("_assert_tensor_metadata", "_guards_fn"):
            continue
        if here.op != "call_function" or has_effect(here) or len(seen) > _DEAD_NODES:
            return False
        new = [u for u in here.users if u not in seen]
        seen.update(new)
        queue.extend(new)
    return True


# --------------------------------------------------------------------------------------------------
# - Layouts


def extents(build: Builder, values: Mapping[str, tuple[Operand, Any]]) -> dict[int, Any]:
    """Extent of every axis of a site, from the values of its operands (ints or size nodes)."""
    found: dict[int, Any] = {}
    for operand, value in values.values():
        for position, dim in enumerate(operand.dims):
            static = 1
            open_axes = [f for f in dim if not isinstance(f.extent, int)]
            for factor in dim:
                if isinstance(factor.extent, int):
                    found[factor.axis] = factor.extent
                    static *= factor.extent
            if len(open_axes) == 1 and open_axes[0].axis not in found:
                size = build.call(aten.sym_size.int, value, position)
                whole = size if static == 1 else build.call(operator.floordiv, size, static)
                found[open_axes[0].axis] = whole
    return found


def _product(build: Builder, sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        if isinstance(size, int) and size == 1:
            continue
        total = (
            size if isinstance(total, int) and total == 1 else build.call(operator.mul, total, size)
        )
    return total


def canonical_groups(roles: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Roles of each canonical dimension: h and g are merged, every other role stands alone."""
    groups: list[tuple[str, ...]] = []
    for role in ROLE_ORDER:
        if role in roles and role != "g":
            groups.append(("h", "g") if role == "h" and "g" in roles else (role,))
    return tuple(groups)


def arrange(
    build: Builder,
    operand: Operand,
    value: Any,
    groups: Sequence[Sequence[Factor]],
    sizes: Mapping[int, Any],
) -> Any:
    """Bring ``value`` (laid out as ``operand.dims``) to one dimension per group of factors.

    Axes that the operand does not have are expanded; no copy is made unless a merge needs one.
    """
    flat = [f for dim in operand.dims for f in dim]
    have = [f.axis for f in flat]
    value = _view(build, value, operand.dims, [(f,) for f in flat], sizes)
    order = [have.index(f.axis) for group in groups for f in group if f.axis in have]
    if order != list(range(len(order))):
        value = build.call(aten.permute.default, value, order)
    missing = [f for group in groups for f in group if f.axis not in have]
    if missing:
        wanted = [f for group in groups for f in group]
        for position, factor in enumerate(wanted):
            if factor.axis not in have:
                value = build.call(aten.unsqueeze.default, value, position)
        shape = [sizes[f.axis] for f in wanted]
        value = build.call(aten.expand.default, value, shape)
    present = [(f,) for group in groups for f in group]
    return _view(build, value, present, [tuple(g) for g in groups], sizes)


def _view(
    build: Builder,
    value: Any,
    dims: Sequence[Sequence[Factor]],
    groups: Sequence[Sequence[Factor]],
    sizes: Mapping[int, Any],
) -> Any:
    if [tuple(f.axis for f in d) for d in dims] == [tuple(f.axis for f in g) for g in groups]:
        return value
    shape = [_product(build, [sizes[f.axis] for f in group]) for group in groups]
    return build.call(aten.reshape.default, value, shape)


def restore(
    build: Builder,
    value: Any,
    groups: Sequence[Sequence[Factor]],
    operand: Operand,
    sizes: Mapping[int, Any],
) -> Any:
    """The inverse of `arrange`: from one dimension per group to the layout of ``operand``."""
    source = Operand(operand.node, tuple(tuple(g) for g in groups))
    return arrange(build, source, value, operand.dims, sizes)


# --------------------------------------------------------------------------------------------------
# - Copies


def copy_graph(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A module with a copy of the graph over the same parameters, and the node of each node.

    Nodes of the copy carry the original as ``meta["origin"]``.
    """
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, nodes)
    old_output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    output = graph.output(result)
    output.meta = dict(old_output.meta)
    for old, new in nodes.items():
        new.meta["origin"] = old
    graph._codegen = module.graph._codegen
    copy = fx.GraphModule(module, graph, class_name=type(module).__name__)
    _share_state(module, copy)
    copy.meta = dict(module.meta)
    return copy, nodes


def _share_state(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give ``target`` every parameter and buffer of ``source``, used by the graph or not."""
    for path, module in source.named_modules():
        if isinstance(module, fx.GraphModule) and path:
            continue
        here = target
        for part in path.split(".") if path else ():
            if part not in here._modules:
                here.add_module(part, torch.nn.Module())
            child = here._modules[part]
            assert child is not None
            here = child
        if here is not module:
            here._parameters.update(module._parameters)
            here._buffers.update(module._buffers)
            here._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
            here.training = module.training


def origin(node: fx.Node) -> fx.Node | None:
    """The node this one was copied from, or replaces; itself in a graph that is no copy."""
    return node.meta.get("origin", node)  # type: ignore[no-any-return]
