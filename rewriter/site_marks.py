"""What splicing says of the nodes of a rewritten site, kept beside a saved program.

torch's archive keeps the name of a node and not what else is said of it.  Without that a program
that is read again would not know its sites: which nodes are of which, and what each computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.export import ExportedProgram

# In the meta of the nodes that are built for a site: its name, and the text of its cascade.
SITE_KEY, CASCADE_KEY = "attn_rewrite_site", "attn_rewrite_cascade"


@dataclass(frozen=True)
class SiteMarks:
    """``nodes`` has the sites of nodes by graph (the path of its module) and name, ``cascades`` the
    texts of rewritten sites, ``anchors`` the operators that attention was found at, by site."""

    nodes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cascades: Mapping[str, str] = field(default_factory=dict)
    anchors: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, program: ExportedProgram, anchors: Mapping[str, str]) -> SiteMarks:
        """What the nodes of ``program`` say."""
        nodes, cascades = {}, {}
        for path, graph in _graphs(program):
            marked = [n for n in graph.nodes if SITE_KEY in n.meta]
            if marked:
                nodes[path] = {n.name: n.meta[SITE_KEY] for n in marked}
            for n in marked:
                if CASCADE_KEY in n.meta:
                    cascades[n.meta[SITE_KEY]] = n.meta[CASCADE_KEY]
        return cls(nodes, cascades, dict(anchors))

    def put_on(self, program: ExportedProgram) -> None:
        """Say it of the nodes of ``program``, which was just read."""
        for path, graph in _graphs(program):
            named = self.nodes.get(path, {})
            for node in graph.nodes:
                site = named.get(node.name)
                if site is None:
                    continue
                node.meta[SITE_KEY] = site
                if site in self.cascades:
                    node.meta[CASCADE_KEY] = self.cascades[site]

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(
            {"nodes": self.nodes, "cascades": self.cascades, "anchors": self.anchors}, indent=1
        )

    @classmethod
    def from_text(cls, text: str) -> SiteMarks:
        """The inverse of `to_text`."""
        data: dict[str, Any] = json.loads(text)
        return cls(data["nodes"], data["cascades"], data["anchors"])


def _graphs(program: ExportedProgram) -> Iterator[tuple[str, fx.Graph]]:
    for path, module in program.graph_module.named_modules():
        if isinstance(module, fx.GraphModule):
            yield path, module.graph
