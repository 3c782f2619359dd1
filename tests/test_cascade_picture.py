"""Pictures of cascades: legible (no two boxes overlap) and true to the pass analysis."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import pytest

from attn_rewrite.cascade import NAMED, parse, pass_analysis
from attn_rewrite.cascade.picture import to_svg
from attn_rewrite.errors import CascadeError

SVG = "{http://www.w3.org/2000/svg}"
Rectangle = tuple[float, float, float, float]


def elements(svg: ET.Element, tag: str, css: str) -> list[ET.Element]:
    return [e for e in svg.iter(SVG + tag) if css in e.get("class", "").split()]


def rectangle(e: ET.Element) -> Rectangle:
    x, y, width, height = (float(e.get(n, "nan")) for n in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a: Rectangle, b: Rectangle) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


@pytest.mark.parametrize("name", list(NAMED))
def test_every_named_cascade_is_legible(name: str):
    svg = ET.fromstring(to_svg(NAMED[name]))
    _, _, width, height = map(float, svg.get("viewBox", "").split())
    boxes = [rectangle(e) for e in elements(svg, "rect", "box")]
    columns = [rectangle(e) for e in elements(svg, "rect", "column")]
    tensors = {t.name for t in NAMED[name].inputs} | {e.out.tensor for e in NAMED[name].einsums()}
    assert len(boxes) == len(tensors)
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    assert not any(overlap(a, b) for a, b in itertools.combinations(columns, 2))
    assert all(sum(inside(b, c) for c in columns) == 1 for b in boxes)
    assert all(inside(c, (0, 0, width, height)) for c in columns)
    for group in svg.iter(SVG + "g"):
        box = rectangle(next(group.iter(SVG + "rect")))
        for text in group.iter(SVG + "text"):
            # A monospaced character of 12 px is at most 7.3 px wide.
            end = float(text.get("x", "nan")) + 7.3 * len(text.text or "")
            assert end <= box[2]
            assert box[1] < float(text.get("y", "nan")) < box[3]


@pytest.mark.parametrize(
    "name", ["attention-1pass", "attention-2pass", "attention-3pass", "causal"]
)
def test_columns_are_passes_and_red_edges_are_barriers(name: str):
    svg, analysis = ET.fromstring(to_svg(NAMED[name])), pass_analysis(NAMED[name], "m")
    heads = [e.text for e in elements(svg, "text", "head")][:-1]  # the last one is the legend
    assert heads == [f"pass {i + 1}" for i in range(analysis.passes)]
    assert len(elements(svg, "path", "barrier")) == len(analysis.barriers)
    live = [g[0].text for g in svg.iter(SVG + "g") if "live" in g[1].get("class", "").split()]
    assert live == list(analysis.live)


def test_a_solver_spans_its_passes():
    svg = ET.fromstring(to_svg(NAMED["sparsemax"]))
    heads = [e.text for e in elements(svg, "text", "head")][:-1]
    assert heads == ["pass 1", "passes 2 to 17", "pass 18"]


def test_states_are_carried():
    svg = ET.fromstring(to_svg(NAMED["attention-1pass"]))
    # RM reads itself, SPD the state RD, SPNV the state RNV.
    assert len(elements(svg, "path", "carried")) == 3


def test_the_rank_may_be_chosen_and_aliased():
    over_queries = to_svg(NAMED["softmax-over-queries"], "q")
    assert "3 passes over p" in over_queries
    assert "1 pass over m" in to_svg(NAMED["softmax-over-queries"])
    assert "2 passes over k" in to_svg(NAMED["dependent-sums"])
    with pytest.raises(ValueError, match="no rank"):
        to_svg(NAMED["causal"], "z")


def test_names_are_escaped():
    svg = to_svg(parse('cascade "a<b>&c"\n"T<1>"[m] = A[m] where m < 3'))
    assert ET.fromstring(svg).findtext(f"{SVG}title", "").startswith("a<b>&c: 1 pass")
    assert "T<1>" not in svg


def test_a_cascade_without_ranks_has_no_picture():
    with pytest.raises(CascadeError, match="has no ranks"):
        to_svg(parse("Y = A * B"))
