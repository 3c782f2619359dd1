"""``RESULTS.md``: written from the results of the rows that were run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.zoo.rows import Result

HERE = Path(__file__).parent
RECORDS = HERE.parents[1] / "build" / "zoo"

_HEAD = """# Results of the zoo

Written by the suite (`python -m tests.zoo` runs rows and writes this file); do not edit.

*expected* counts attention by running the model eagerly under a dispatch mode (`census.py`): fused
calls, and softmax calls between two products of activations.  The finder has no part in it.
*found* counts Sites; a row with more Sites than attentions is not in full either.  *exact* is the
greatest error of the exactly rewritten model against float64 over its bound: twice the original's
own error, or 4 eps of the greatest value.  A row that is not captured, neither ahead of time nor
just in time, counts as not found.  Rows that the library cannot build or run here, and rows without
attention, are left out of the rate; spellings that the library does not offer are left out of the
table, and so are rows that were not run.
"""


_TABLE = (
    "| architecture | spelling | expected | found | families | refused (code) | exact | "
    "not captured, or why |",
    "|---|---|---|---|---|---|---|---|",
)


def shown(library: str, path: Path = HERE / "RESULTS.md") -> list[str]:
    """Names of the rows that the table shows to run, in full and exactly, in its order."""
    section = path.read_text().partition(f"\n## {library}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [
        f"{library}/{row[0].removeprefix('| ')}/{row[1]}"
        for row in rows
        if row[2].isdecimal()
        and 0 < int(row[2]) <= int(row[3])
        and row[7] == " |"
        and all(float(ratio) < 1 for ratio in re.findall(r"\d+\.\d+", row[6]))
    ]


def record(result: Result) -> None:
    """Keep a result for the table."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / (result.row.replace("/", "~") + ".json")
    path.write_text(json.dumps(dataclasses.asdict(result)))


def recorded() -> list[Result]:
    """Every result kept, by row name."""
    return [Result(**json.loads(p.read_text())) for p in sorted(RECORDS.glob("*.json"))]


def write(results: Iterable[Result], path: Path = HERE / "RESULTS.md") -> None:
    """Write the rates and the table."""
    results = sorted((r for r in results if r.stage != "absent"), key=lambda r: r.row)
    # Where a process died nothing was counted, but there may have been something to find.
    counted = [r for r in results if r.stage != "build" and (r.expected or r.stage == "failed")]
    text = [
        _HEAD,
        "| library | rows | all found | rate | Sites / expected | "
        "rewritten exactly | not run here |",
        "|---|---|---|---|---|---|---|",
    ]
    for library in dict.fromkeys(r.row.partition("/")[0] for r in results):
        text.append(_rate(library, results, counted))
    for library in dict.fromkeys(r.row.partition("/")[0] for r in results):
        text += ["", f"## {library}", "", *_TABLE]
        text += [_line(r) for r in results if r.row.startswith(f"{library}/")]
    path.write_text("\n".join(text) + "\n")


def _rate(library: str, results: list[Result], counted: list[Result]) -> str:
    own = [r for r in counted if r.row.startswith(f"{library}/")]
    full = [r for r in own if r.complete]
    sites = sum(min(r.found, r.expected) for r in own)
    exact = sum(r.exact for r in full)
    skipped = sum(r.stage == "build" and r.row.startswith(f"{library}/") for r in results)
    rate = f"{len(full) / len(own):.1%}" if own else "-"
    expected = sum(r.expected for r in own)
    cells = (library, len(own), len(full), rate, f"{sites} / {expected}", f"{exact} of {len(full)}")
    return _cells(*cells, skipped)


def _line(result: Result) -> str:
    _, architecture, spelling = result.row.rsplit("/", 2)
    codes = Counter(code for code, _, _ in result.refused)
    refused = ", ".join(f"{code} x{n}" for code, n in codes.items())
    families = ", ".join(f"{f} x{n}" for f, n in result.families.items())
    exact = ", ".join(f"{d} {e / b if b else 0.0:.2f}" for d, (e, b) in result.errors.items())
    problem = (
        ""
        if result.stage == "done"
        else f"{result.stage}: {_anywhere(result.problem)[:160]}".replace("|", "/")
    )
    if result.just_in_time and not problem:
        problem = f"captured just in time: {_anywhere(result.just_in_time)[:160]}".replace("|", "/")
    counts = (result.expected, result.found)
    return _cells(architecture, spelling, *counts, families, refused, exact, problem)


def _anywhere(text: str) -> str:
    """Paths without the folders of the machine that ran the row."""
    return re.sub(r"(?:/[^\s:/]+)+/(site-packages|tests|rewriter|passes|backends)/", r"\1/", text)


def _cells(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"
