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

Written by the suite (`python -m tests.zoo` runs rows and writes this file); do not edit.  Rows that
were not run again keep the line of the run before, and count with it.

Rows are taken from the libraries' own registries, by place and not by hand: all ways to make and
call the attention of torch.nn, every denoiser that diffusers exports, the smallest model of every
file of timm with attention in it (one of its two spellings by turns), and every sixth model type of
transformers in the order of its `MODEL_MAPPING`, eager and sdpa.

*expected* counts attention by running the model eagerly under a dispatch mode (`census.py`): fused
calls, and softmax calls between two products of activations.  The finder has no part in it.
*found* counts Sites; a row with more Sites than attentions is not in full either.  *exact* is the
greatest error of the exactly rewritten model against float64 over its bound: twice the original's
own error, or 4 eps of the greatest value.  A row that is not captured, neither ahead of time nor
just in time, counts as not found.  Rows that the library cannot build or run here, and rows without
attention, are left out of the rate; spellings that the library does not offer are left out of the
table, and so are rows that were not run.
"""


_MORE = "more Sites than attentions"
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
    """Write the rates and the table: a line for each result, and the lines of the table before for
    rows that have no result."""
    results = list(results)
    lines = {(r.row.partition("/")[0], *r.row.rsplit("/", 2)[1:]): _line(r) for r in results}
    absent = {key for key, r in zip(lines, results, strict=True) if r.stage == "absent"}
    before = _before(path) if path.exists() else {}
    cells = {k: v for k, v in (before | lines).items() if k not in absent}
    text = [
        _HEAD,
        "| library | rows | all found | rate | Sites / expected | "
        "rewritten exactly | not run here |",
        "|---|---|---|---|---|---|---|",
    ]
    libraries = sorted({key[0] for key in cells})
    for library in libraries:
        text.append(_rate(library, [v for k, v in sorted(cells.items()) if k[0] == library]))
    for library in libraries:
        text += ["", f"## {library}", "", *_TABLE]
        text += [_cells(*v) for k, v in sorted(cells.items()) if k[0] == library]
    path.write_text("\n".join(text) + "\n")


def _before(path: Path) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Cells of the rows of a table, by library, architecture and spelling."""
    out: dict[tuple[str, ...], tuple[str, ...]] = {}
    for section in path.read_text().split("\n## ")[1:]:
        library, *rows = section.splitlines()
        for row in rows:
            cells = tuple(row.removeprefix("| ").removesuffix(" |").split(" | "))
            if row.startswith("| ") and cells[0] != "architecture":
                out[library, cells[0], cells[1]] = cells
    return out


def _rate(library: str, rows: list[tuple[str, ...]]) -> str:
    # Where a process died nothing was counted, but there may have been something to find.
    own = [
        r for r in rows if not r[7].startswith("build") and (r[2] != "0" or r[7][:6] == "failed")
    ]
    short = ("failed", "capture:", _MORE)
    full = [r for r in own if not r[7].startswith(short) and int(r[2]) <= int(r[3])]
    exact = sum(_is_exact(r) for r in full)
    sites = sum(min(int(r[2]), int(r[3])) for r in own)
    rate = f"{len(full) / len(own):.1%}" if own else "-"
    expected = sum(int(r[2]) for r in own)
    skipped = sum(r[7].startswith("build") for r in rows)
    cells = (library, len(own), len(full), rate, f"{sites} / {expected}", f"{exact} of {len(full)}")
    return _cells(*cells, skipped)


def _is_exact(cells: tuple[str, ...]) -> bool:
    return all(float(ratio) < 1 for ratio in re.findall(r"\d+\.\d+", cells[6]))


def _line(result: Result) -> tuple[str, ...]:
    _, architecture, spelling = result.row.rsplit("/", 2)
    codes = Counter(code for code, _, _ in result.refused)
    refused = ", ".join(f"{code} x{n}" for code, n in codes.items())
    families = ", ".join(f"{f} x{n}" for f, n in result.families.items())
    exact = ", ".join(f"{d} {_ratio(e, b)}" for d, (e, b) in result.errors.items())
    problem = ""
    if result.stage not in ("done", "absent"):
        problem = f"{result.stage}: {_anywhere(result.problem)[:160]}"
    elif not result.complete:
        problem = _MORE if result.found > result.expected else "not in full"
    elif result.just_in_time:
        problem = f"captured just in time: {_anywhere(result.just_in_time)[:160]}"
    counts = (str(result.expected), str(result.found))
    problem = problem.replace("|", "/").strip()
    return (architecture, spelling, *counts, families, refused, exact, problem)


def _ratio(error: float, bound: float) -> str:
    """Below 1.00 exactly where it is within the bound."""
    ratio = error / bound if bound else 0.0
    return f"{min(ratio, 0.99):.2f}" if ratio <= 1 else f"{ratio:.2f}"


def _anywhere(text: str) -> str:
    """Paths without the folders of the machine that ran the row."""
    return re.sub(r"(?:/[^\s:/]+)+/(site-packages|tests|rewriter|passes|backends)/", r"\1/", text)


def _cells(*values: object) -> str:
    return f"| {' | '.join(map(str, values))} |"
