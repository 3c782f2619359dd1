"""A picture of a cascade: its dataflow as SVG, with the passes over one rank as columns.

Solid arrows are values that stream, red ones wait for the end of a traversal (each starts another
pass), dashed ones are carried to the next step of an iterative rank.  Tensors that must be held for
a whole fiber have a thick border, Einsums that do not traverse the rank a dashed one.
"""

from __future__ import annotations

import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_rewrite.cascade.expr import Read
from attn_rewrite.cascade.infer import reads
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop
from attn_rewrite.cascade.text import einsum_to_text
from attn_rewrite.errors import CascadeError

if TYPE_CHECKING:
    from attn_rewrite.cascade.count import PassAnalysis

_CHAR, _LINE, _PAD, _GAP, _LANE, _TOP = 7.3, 16.0, 9.0, 26.0, 78.0, 74.0
_WRAP = 58
_STYLE = """
text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #1f2430; }
.title { font-weight: 600; font-size: 14px; }
.head { font-weight: 600; fill: #59627a; }
.column { fill: #f4f6fa; }
.box { fill: #ffffff; stroke: #59627a; }
rect.input { fill: #e7f0e4; stroke: #6c8f62; }
rect.post { stroke-dasharray: 5 3; }
rect.live { stroke: #b45309; stroke-width: 3; }
.edge { fill: none; stroke: #7b869e; stroke-width: 1.3; }
.carried { stroke-dasharray: 5 4; }
.barrier { stroke: #c02626; stroke-width: 2; }
"""
_ARROWS = {"flow": "#7b869e", "carried": "#7b869e", "barrier": "#c02626"}


@dataclass(frozen=True)
class _Box:
    """A tensor with the Einsums that write it, at its place in the picture."""

    tensor: str
    lines: tuple[str, ...]
    css: str
    column: int
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + 2 * _PAD

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


@dataclass(frozen=True)
class _Edge:
    """``kind`` is flow, carried or barrier."""

    source: str
    target: str
    kind: str


def to_svg(cascade: Cascade, rank: str | None = None) -> str:
    """An SVG document of ``cascade``, columns being its passes over ``rank`` (aliases accepted).

    Without ``rank`` the keys (``kv`` or ``m``) are taken, else the rank that needs most passes.
    Raises `CascadeError` when the passes cannot be counted, `ValueError` for an unknown rank.
    """
    from attn_rewrite.cascade.count import pass_analysis

    analysis = pass_analysis(cascade, _default_rank(cascade) if rank is None else rank)
    levels = _levels(cascade, analysis)
    boxes = _placed(list(_boxes(cascade, analysis, levels)))
    edges = list(_edges(cascade, analysis))
    return _document(cascade, analysis, boxes, edges, _heads(levels, analysis))


def _default_rank(cascade: Cascade) -> str:
    from attn_rewrite.cascade.count import count_passes

    names = [r.name for r in cascade.ranks]
    for name in ("kv", "m"):
        if name in names:
            return name
    if not names:
        raise CascadeError(f"cascade {cascade.name} has no ranks, so it has no passes to draw")
    return max(names, key=lambda n: count_passes(cascade, n))


# What is drawn


def _levels(cascade: Cascade, analysis: PassAnalysis) -> dict[str, tuple[int, int]]:
    """First and last pass of every tensor that traverses the rank, numbered without holes.

    A solver written out has one entry per step (``TAU@3``); its tensor spans all of them.
    """
    number = {p: i + 1 for i, p in enumerate(sorted(set(analysis.pass_of.values())))}
    found: dict[str, tuple[int, int]] = {}
    for name, level in analysis.pass_of.items():
        low, high = found.get(_base(name), (number[level], number[level]))
        found[_base(name)] = min(low, number[level]), max(high, number[level])
    return found


def _base(name: str) -> str:
    return name.partition("@")[0]


def _writers(cascade: Cascade) -> dict[str, list[Einsum]]:
    """The Einsums of every tensor, tensors in the order in which they are last written."""
    found: dict[str, list[Einsum]] = {}
    for e in cascade.einsums():
        found[e.out.tensor] = [*found.pop(e.out.tensor, []), e]
    return found


def _boxes(
    cascade: Cascade, analysis: PassAnalysis, levels: dict[str, tuple[int, int]]
) -> Iterator[_Box]:
    """Inputs stand in the pass that reads them first, other tensors in that of their sources."""
    writers = _writers(cascade)
    column: dict[str, int] = {}
    for tensor, einsums in writers.items():
        sources = (column.get(r.tensor, 1) for e in einsums for r in reads(e))
        column[tensor] = levels[tensor][0] if tensor in levels else max(sources, default=1)
    for t in cascade.inputs:
        readers = (n for n, es in writers.items() if any(_reads(e, t.name) for e in es))
        first = min((column[n] for n in readers), default=1)
        yield _Box(t.name, (f"{t.name}[{', '.join(t.ranks)}]",), "input", first)
    live = {_base(t) for t in analysis.live}
    for tensor, einsums in writers.items():
        lines = tuple(line for e in einsums for line in _wrapped(einsum_to_text(e)))
        css = "" if tensor in levels else " post"
        yield _Box(tensor, lines, css + " live" * (tensor in live), column[tensor])


def _reads(e: Einsum, tensor: str) -> bool:
    return any(r.tensor == tensor for r in reads(e))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WRAP, subsequent_indent="    ", break_long_words=False)


def _edges(cascade: Cascade, analysis: PassAnalysis) -> Iterator[_Edge]:
    barriers = {(_base(a), _base(b)) for a, b in analysis.barriers}
    order = {t: i for i, t in enumerate(_writers(cascade))}
    kinds: dict[tuple[str, str], str] = {}
    for statement in cascade.body:
        loop = statement if isinstance(statement, Loop) else None
        for e in (*loop.init, *loop.body) if loop else (statement,):
            assert isinstance(e, Einsum)
            for read in reads(e):
                pair = (read.tensor, e.out.tensor)
                later = order.get(pair[0], -1) >= order[pair[1]]
                kind = "carried" if later or _is_carried(read, e, loop) else "flow"
                kind = "barrier" if pair in barriers else kind
                if kinds.get(pair) != "flow":  # a value of this step counts more
                    kinds[pair] = kind
    for (source, target), kind in kinds.items():
        yield _Edge(source, target, kind)


def _is_carried(read: Read, reader: Einsum, loop: Loop | None) -> bool:
    """Does the read take a state of another step than the one that the body writes?"""
    if loop is None or reader not in loop.body:
        return False
    written = [e.out for e in loop.body if e.out.tensor == read.tensor]
    return bool(written) and read not in written


def _heads(levels: dict[str, tuple[int, int]], analysis: PassAnalysis) -> dict[int, str]:
    heads: dict[int, str] = {}
    for low in {span[0] for span in levels.values()} | {1}:
        high = max((span[1] for span in levels.values() if span[0] == low), default=low)
        heads[low] = f"pass {low}" if low == high else f"passes {low} to {high}"
    return heads if analysis.pass_of else {1: f"no pass over {analysis.rank}"}


# Where it is drawn


def _placed(boxes: list[_Box]) -> dict[str, _Box]:
    """Boxes stacked in their columns, in program order."""
    placed: dict[str, _Box] = {}
    x = _LANE
    for column in sorted({b.column for b in boxes}):
        stack = [b for b in boxes if b.column == column]
        width = max(_CHAR * max(map(len, b.lines)) + 2 * _PAD for b in stack)
        y = _TOP
        for b in stack:
            placed[b.tensor] = _Box(b.tensor, b.lines, b.css, column, x, y, width)
            y += b.height + _GAP
        x += width + 2 * _LANE
    return placed


def _path(source: _Box, target: _Box) -> str:
    """A curve between two boxes: down the column, around it, or across to another one."""
    if source.tensor == target.tensor:
        x, y = source.x + source.width, source.middle
        return f"M {x} {y - 6} C {x + 34} {y - 22}, {x + 34} {y + 22}, {x + 2} {y + 6}"
    if source.column != target.column:
        forward = source.column < target.column
        x1 = source.x + source.width if forward else source.x
        x2 = target.x - 2 if forward else target.x + target.width + 2
        reach = max(30.0, abs(x2 - x1) / 2) * (1 if forward else -1)
        y1, y2 = source.middle, target.middle
        return f"M {x1} {y1} C {x1 + reach} {y1}, {x2 - reach} {y2}, {x2} {y2}"
    distance = target.y - (source.y + source.height)
    if 0 < distance <= _GAP:
        x = source.x + source.width / 2
        return f"M {x} {source.y + source.height} L {x} {target.y - 2}"
    bulge = min(_LANE - 8, 14 + abs(target.y - source.y) / 9)
    down = target.y > source.y
    x = source.x if down else source.x + source.width
    out, end = (x - bulge, x - 2) if down else (x + bulge, x + 2)
    y1, y2 = source.middle, target.middle
    return f"M {x} {y1} C {out} {y1}, {out} {y2}, {end} {y2}"


# The document


def _document(
    cascade: Cascade,
    analysis: PassAnalysis,
    boxes: dict[str, _Box],
    edges: list[_Edge],
    heads: dict[int, str],
) -> str:
    width = max((b.x + b.width for b in boxes.values()), default=300.0) + _LANE
    bottom = max((b.y + b.height for b in boxes.values()), default=_TOP)
    title, legend = _title(cascade, analysis), _legend(analysis)
    width, height = max(width, len(title) * 8.6 + 48, len(legend) * _CHAR + 48), bottom + 60
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width:.0f} {height:.0f}",
            "width": f"{width:.0f}",
            "height": f"{height:.0f}",
        },
    )
    ET.SubElement(svg, "title").text = title
    ET.SubElement(svg, "style").text = _STYLE
    _add_arrows(svg)
    _add(svg, "rect", x=0, y=0, width=width, height=height, fill="#ffffff")
    _add_text(svg, 24, 28, title, "title")
    for column in sorted({b.column for b in boxes.values()}):
        _add_column(svg, [b for b in boxes.values() if b.column == column], heads, bottom)
    for edge in edges:
        if edge.source in boxes and edge.target in boxes:
            path = _add(svg, "path", d=_path(boxes[edge.source], boxes[edge.target]))
            path.set("class", f"edge {edge.kind}")
            path.set("marker-end", f"url(#{edge.kind})")
    for box in boxes.values():
        _add_box(svg, box)
    _add_text(svg, 24, height - 20, legend, "head")
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _title(cascade: Cascade, analysis: PassAnalysis) -> str:
    passes = f"{analysis.passes} pass{'' if analysis.passes == 1 else 'es'} over {analysis.rank}"
    live = ", ".join(dict.fromkeys(map(_base, analysis.live))) or "nothing"
    return f"{cascade.name}: {passes}; held for a whole fiber: {live}"


def _legend(analysis: PassAnalysis) -> str:
    return (
        "red: waits for all of it; dashed arrow: carried to the next step; "
        f"dashed box: does not traverse {analysis.rank}"
    )


def _add_arrows(svg: ET.Element) -> None:
    defs = ET.SubElement(svg, "defs")
    for kind, colour in _ARROWS.items():
        box = {"viewBox": "0 0 8 8", "refX": "7", "refY": "4", "orient": "auto"}
        size = {"markerWidth": "7", "markerHeight": "7", "markerUnits": "userSpaceOnUse"}
        marker = ET.SubElement(defs, "marker", {"id": kind, **box, **size})
        ET.SubElement(marker, "path", {"d": "M 0 0 L 8 4 L 0 8 z", "fill": colour})


def _add_column(svg: ET.Element, boxes: list[_Box], heads: dict[int, str], bottom: float) -> None:
    first = boxes[0]
    frame = {"x": first.x - 14, "y": _TOP - 32, "width": first.width + 28}
    _add(svg, "rect", **frame, height=bottom - _TOP + 46, rx=6).set("class", "column")
    _add_text(svg, first.x, _TOP - 13, heads.get(first.column, ""), "head")


def _add_box(svg: ET.Element, box: _Box) -> None:
    group = ET.SubElement(svg, "g")
    ET.SubElement(group, "title").text = box.tensor
    rect = _add(group, "rect", x=box.x, y=box.y, width=box.width, height=box.height, rx=4)
    rect.set("class", f"box {box.css}")
    for i, line in enumerate(box.lines):
        _add_text(group, box.x + _PAD, box.y + _PAD + 12 + i * _LINE, line)


def _add(parent: ET.Element, tag: str, **attributes: str | float) -> ET.Element:
    plain = {k: v if isinstance(v, str) else f"{v:g}" for k, v in attributes.items()}
    return ET.SubElement(parent, tag, plain)


def _add_text(parent: ET.Element, x: float, y: float, text: str, css: str = "") -> None:
    node = _add(parent, "text", x=x, y=y)
    node.set("xml:space", "preserve")
    if css:
        node.set("class", css)
    node.text = text
