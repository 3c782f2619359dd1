"""What the queries of a Site are projected from: the input of an attention layer.

The queries are followed back, through whatever is done to them (views, rotary embedding, norms), to
the matrix products with parameters that they come from.  No class of any library is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attn_rewrite.graph import is_parameter, is_tensor, op_name, shape_of

if TYPE_CHECKING:
    from torch import fx

    from attn_rewrite.site import Factor, Site

_STEPS = 2000
# Position of the activation among the arguments of a product with parameters.
_PROJECTIONS = {"linear": 0, "mm": 0, "matmul": 0, "addmm": 1, "addmm_": 1}
_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "alias", "contiguous"})


@dataclass(frozen=True, eq=False)
class GateInput:
    """An activation [..., channels] with the axes of its other dimensions."""

    node: fx.Node
    dims: tuple[tuple[Factor, ...], ...]
    channels: int


def gate_input(site: Site) -> GateInput | str:
    """The activation that the queries of ``site`` are projected from, or why there is none."""
    operand = site.inputs.get("Q")
    if operand is None:
        return "there is no graph to take the layer's input from"
    sources = list(_sources(operand.node))
    for node in sources:
        dims = _dims(site, node)
        channels = shape_of(node)[-1]
        if dims is not None and isinstance(channels, int):
            return GateInput(node, dims, channels)
    if not sources:
        return "its queries are projected from no activation with parameters of the model"
    shape = [str(n) for n in shape_of(sources[0])]
    return (
        f"its queries are projected from {sources[0]} of shape [{', '.join(shape)}], whose batch "
        "and tokens are not told apart"
    )


def _sources(node: fx.Node) -> list[fx.Node]:
    """Activations that are multiplied by parameters on the way to ``node``, in graph order."""
    queue, seen, found = [node], {node}, set()
    while queue and len(seen) < _STEPS:
        here = queue.pop()
        source = _projected(here)
        if source is not None:
            found.add(_unflattened(source))
            continue
        new = [a for a in here.all_input_nodes if a not in seen and not _constant(a)]
        seen.update(new)
        queue += new
    return [n for n in node.graph.nodes if n in found]


def _projected(node: fx.Node) -> fx.Node | None:
    """What ``node`` multiplies by parameters, if it does."""
    at = _PROJECTIONS.get(op_name(node))
    if at is None or len(node.args) < at + 2:
        return None
    x, weight = node.args[at : at + 2]
    if not is_tensor(x) or not is_tensor(weight):
        return None
    if not _constant(weight) or _constant(x):
        return None
    return x  # type: ignore[return-value]


def _constant(node: Any) -> bool:
    """Does ``node`` follow from parameters alone?"""
    queue, seen = [node], {node}
    while queue:
        here = queue.pop()
        if is_parameter(here):
            continue
        if here.op != "call_function" or not here.all_input_nodes or len(seen) > 16:
            return False
        new = [a for a in here.all_input_nodes if a not in seen]
        seen.update(new)
        queue += new
    return True


def _unflattened(node: fx.Node) -> fx.Node:
    """The activation before batch and tokens were made one dimension."""
    while len(shape_of(node)) < 3 and op_name(node) in _VIEWS:
        source: Any = node.args[0]
        if not is_tensor(source) or str(shape_of(source)[-1]) != str(shape_of(node)[-1]):
            break
        node = source
    return node


def _dims(site: Site, node: fx.Node) -> tuple[tuple[Factor, ...], ...] | None:
    """The axes of all dimensions but the channels; None where sizes do not tell."""
    shape = [str(n) for n in shape_of(node)[:-1]]
    batch, _, tokens, _ = site.groups("AV")
    if len(shape) == 1 + len(batch) and len(batch) > 1:
        wanted = [(f,) for f in batch] + [tokens]
        sizes = [_size(axes) for axes in wanted]
        return tuple(wanted) if sizes == shape else None
    first, second = _size(batch), _size(tokens)
    if len(shape) != 2 or sorted(shape) != sorted((first, second)):
        return None
    if shape == [first, second]:
        # Equal sizes: batch first, unless the graph shows that tokens are.
        return None if first == second and _tokens_first(node, site) else (batch, tokens)
    return (tokens, batch)


def _tokens_first(node: fx.Node, site: Site) -> bool:
    """Are the queries laid out with their tokens before their batch, as far as is seen?"""
    dims = site.inputs["Q"].dims
    roles = [f.role for dim in dims for f in dim]
    return "b" in roles and roles.index("q") < roles.index("b")


def _size(axes: tuple[Factor, ...]) -> str:
    size: Any = 1
    for axis in axes:
        size = axis.extent if isinstance(size, int) and size == 1 else size * axis.extent
    return str(size)
