"""Models that cannot be one graph, through the torch.compile front end: broken where they must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attn_rewrite.compile_backend import GraphRecord, Session, attn_rewrite


class JustInTime(torch.nn.Module):
    """A model whose graphs are rewritten as a call meets them; counts what the last call ran.

    Layers of one kind share a graph, so that the Sites of a call are those of the graphs it runs,
    each as often as it runs, and not those of the graphs that were made.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        torch._dynamo.reset()
        self._session = Session()
        self._ran: list[GraphRecord] = []
        self._compiled = [torch.compile(model, backend=self._backend)]  # a list: not a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        self._ran.clear()
        return self._compiled[0](*args, **kwargs)

    @property
    def found(self) -> int:
        """Sites in the graphs of the last call."""
        return sum(len(record.sites) for record in self._ran)

    @property
    def rewritten(self) -> int:
        """Sites that the last call ran rewritten."""
        return sum(len(record.kernels) for record in self._ran)

    @property
    def families(self) -> dict[str, int]:
        """Sites of the last call by family."""
        names = [site.family for record in self._ran for site in record.sites]
        return {name: names.count(name) for name in names}

    @property
    def refused(self) -> list[tuple[str, str, str]]:
        """(code, reason, source line) of what is no Site, once for each graph."""
        return [(r.code, r.reason, r.source or "") for r in self._session.refusals]

    def _backend(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        options = {"policy": "exact", "compiler": "eager", "session": self._session}
        run = attn_rewrite(graph, inputs, options=options)
        record = self._session.graphs[-1]

        def counted(*args: Any) -> Any:
            self._ran.append(record)
            return run(*args)

        return counted
