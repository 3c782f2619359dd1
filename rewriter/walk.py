"""Running a graph node by node, and showing the values of its Sites to who asked for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import fx
from torch.utils import _pytree as pytree

from attn_rewrite.region import boundary
from attn_rewrite.site import Site


def flat_inputs(
    host: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> list[Any]:
    """Arguments in the order of the graph's placeholders."""
    info = getattr(host.graph._codegen, "pytree_info", None)
    kwargs = dict(kwargs or {})
    spec = info.in_spec if info is not None else None
    if spec is not None and kwargs and len(spec.children()) == 2:
        order = spec.child(1).context
        kwargs = {name: kwargs[name] for name in order if name in kwargs}
    leaves = pytree.tree_leaves((tuple(args), kwargs))
    wanted = sum(n.op == "placeholder" for n in host.graph.nodes)
    if len(leaves) != wanted:
        raise ValueError(f"the graph has {wanted} inputs, {len(leaves)} values were given")
    return leaves


class Observer(Protocol):
    """Who is shown the values of Sites while a graph runs."""

    @property
    def sites(self) -> Mapping[fx.Node, Sequence[Site]]:
        """The Sites by output node."""

    @property
    def graphs(self) -> set[fx.Graph]:
        """The graphs that hold them."""

    def computed(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        """Called once ``node`` has its value, with every value its Sites need."""


class Walk(fx.Interpreter):
    """Runs a graph node by node and shows every Site's values to the observer."""

    def __init__(self, module: fx.GraphModule, observed: Observer) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.observed = observed
        here = {n.name: n for n in module.graph.nodes}
        for node, sites in observed.sites.items():
            if here.get(node.name) is node:
                for site in sites:
                    self._hold((*boundary(site), *site.results), node)

    def _hold(self, values: Iterable[fx.Node], until: fx.Node) -> None:
        """Keep values until a Site's output has been seen, even if their last user ran before."""
        order = {n: i for i, n in enumerate(until.graph.nodes)}
        held = set(values)
        for user, last_used in list(self.user_to_last_uses.items()):
            early = [n for n in last_used if n in held and order[user] <= order[until]]
            if early:
                self.user_to_last_uses[user] = [n for n in last_used if n not in early]
                self.user_to_last_uses.setdefault(until, []).extend(early)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; at a Site's output, check the Site."""
        value = super().run_node(n)
        if n in self.observed.sites:
            self.observed.computed(n, {**self.env, n: value})
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Graphs called by higher-order operators (autocast, no_grad) are walked like this one."""
        return super().call_function(target, tuple(map(self._walked, args)), kwargs)

    def _walked(self, value: Any) -> Any:
        if not isinstance(value, fx.GraphModule) or not self._has_sites(value):
            return value
        inner = Walk(value, self.observed)
        return lambda *args: inner.run(*args)

    def _has_sites(self, module: fx.GraphModule) -> bool:
        inner = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
        return any(m.graph in self.observed.graphs for m in inner)
