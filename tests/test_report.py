"""Reports: JSON in and out, and a console table that says the same."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace

from rich.console import Console

from attn_rewrite.report import (
    COLUMNS,
    ErrorMeasure,
    Report,
    SiteReport,
    WorkCost,
    number,
    render,
    site_row,
)
from attn_rewrite.site import Refusal
from tests.sites import make_site

SMALL = ErrorMeasure(0.99999987, 1.25e-7, 3.5e-8, 2.625e-7, 1.75, 3)
LARGE = ErrorMeasure(0.98765432, 0.0321, 0.0456, 0.789, 1.75, 3)
NEAR_MISS = Refusal("router", "this softmax [b]selects[/b] experts", "softmax_3", "m.py:3, f")
ESCAPE = Refusal("probabilities-escape", "the map is returned", site="layer.1.attn#0")

REPORT = Report(
    sites=(
        SiteReport(
            "layer.0.attn#0",
            make_site(causal=True).facts(),
            ("window(size=256, sinks=4)",),
            "tiled",
            "approximate",
            implementation=SMALL,
            implementation_bound=8.25e-7,
            approximation=LARGE,
            unbudgeted=True,
            cost_before=WorkCost(4.5e9, 1.25e6, (64, 64)),
            cost_after=WorkCost(1.5e9, 1.125e6, (21, 64)),
            seconds=0.125,
        ),
        SiteReport("layer.1.attn#0", make_site().facts(), ("keep",), refusals=(ESCAPE,)),
        SiteReport(
            "layer.2.attn#0",
            make_site().facts(),
            ("exact",),
            "sdpa",
            implementation=replace(SMALL, max_abs=0.0),
            implementation_bound=1e-7,
            approximation=replace(LARGE, cosine=0.0, relative_l1=math.inf, max_abs=math.inf),
            reverted=True,
        ),
    ),
    refusals=(NEAR_MISS,),
    end_to_end={"logits": LARGE},
    timings={"capture": 1.5, "verify": 0.25},
    versions={"torch": "2.11"},
    inputs="generated: batch 2, length 512, seed 0",
    notes=("batch is dynamic",),
    budget="cosine>=0.999",
)


def test_json_round_trip():
    text = json.dumps(REPORT.to_json(), allow_nan=False)
    data = json.loads(text)
    assert set(data) >= {"sites", "refusals", "end_to_end", "timings", "versions"}
    again = Report.from_json(data)
    assert again == REPORT
    assert again.to_json() == REPORT.to_json()
    assert Report.from_json(Report().to_json()) == Report()


def test_status():
    assert [s.status for s in REPORT.sites] == ["unbudgeted", "refused", "reverted"]
    plain = SiteReport("x")
    assert plain.status == "kept"
    assert replace(plain, kernel="sdpa").status == "rewritten"


def text_of(report, width=400):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    render(report, console)
    return console.file.getvalue()


def table_rows(text):
    """Cells of the printed table, by row; the header first."""
    lines = [re.split(r"[│┃]", line)[1:-1] for line in text.splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in line] for line in lines]


def test_the_table_is_the_report():
    """Read the numbers back from the printed table and compare them with those of report.json."""
    data = REPORT.to_json()
    header, *rows = table_rows(text_of(REPORT))
    assert tuple(header) == COLUMNS
    assert len(rows) == len(data["sites"])
    for row, site in zip(rows, data["sites"], strict=True):
        cells = dict(zip(header, row, strict=True))
        assert cells["site"] == site["name"]
        assert cells["status"] == site["status"]
        assert cells["steps"] == "; ".join(site["steps"])
        assert cells["kernel"] == (site["kernel"] or "-")
        if site["implementation"] is not None:
            error, bound = map(float, cells["impl. error / bound"].split(" / "))
            assert math.isclose(error, site["implementation"]["max_abs"], rel_tol=6e-3)
            assert math.isclose(bound, site["implementation_bound"], rel_tol=6e-3)
        if site["approximation"] is not None:
            cosine, l1 = re.findall(r"cos (\S+), L1 (\S+)", cells["approx. error"])[0]
            assert math.isclose(float(cosine), site["approximation"]["cosine"], abs_tol=1e-6)
            assert math.isclose(
                float(l1), float(site["approximation"]["relative_l1"]), rel_tol=6e-3
            )
        if site["cost_after"] is not None:
            tiles = site["cost_after"]["tiles"]
            assert cells["tiles"] == f"{tiles['executed']}/{tiles['total']}"
            for what in ("flops", "bytes"):
                before, after = map(float, cells[what].split(" -> "))
                assert math.isclose(before, site["cost_before"][what], rel_tol=6e-3)
                assert math.isclose(after, site["cost_after"][what], rel_tol=6e-3)
    assert rows[0][1] == "self causal"


def test_everything_else_is_printed_too():
    text = text_of(REPORT)
    for refusal in (NEAR_MISS, ESCAPE):
        assert f"refused: {refusal}" in text
    assert "end to end, logits: cos 0.987654, L1 0.0321, max 0.789, rmse 0.0456" in text
    assert "generated: batch 2, length 512, seed 0" in text
    assert "budget: cosine>=0.999" in text
    assert "batch is dynamic" in text
    assert "capture 1.50 s, verify 0.25 s" in text


def test_a_narrow_console_loses_no_text():
    """Cells are folded, never cut."""
    text = "".join(text_of(REPORT, width=100).split())
    assert "…" not in text
    for site in REPORT.sites:
        assert len(site_row(site.to_json())) == len(COLUMNS)


def test_an_empty_report_is_printable():
    assert text_of(Report()).strip() == ""


def test_numbers():
    assert [number(v) for v in (None, 0.0, 1234567.0, "inf")] == ["-", "0", "1.23e+06", "inf"]


def test_a_refusal_of_a_site_is_listed_once():
    twice = replace(REPORT, refusals=(NEAR_MISS, ESCAPE))
    assert text_of(twice).count("[probabilities-escape]") == 1
