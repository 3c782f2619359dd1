"""Reading a plan that may have been edited by hand: every mistake is named with its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_rewrite.budget import suggest
from attn_rewrite.errors import PolicyError
from attn_rewrite.passes.transform import Transform
from attn_rewrite.plan import SCHEMA, Plan, Step
from attn_rewrite.policy import KINDS
from attn_rewrite.policy_text import Transforms, parse_pipeline
from attn_rewrite.site import Refusal
from attn_rewrite.tables import read_tables

_PLAN_KEYS = ("schema", "policy", "versions", "hash", "tables", "steps", "refusals")
_STEP_KEYS = ("site", "transforms", "heads", "named_kinds", "exactness", "note", "tiles")
_REFUSAL_KEYS = ("code", "reason", "node", "source", "site")


def read_plan(
    data: object, transforms: Transforms | None = None, tables: Path | None = None
) -> Plan:
    """A `Plan` from plain values or a JSON document (`PolicyError` where it is wrong)."""
    if isinstance(data, str | bytes):
        try:
            data = json.loads(data)
        except ValueError as error:
            raise PolicyError(f"the plan is not valid JSON: {error}") from None
    table = _table(data, "plan", _PLAN_KEYS)
    if table.get("schema") != SCHEMA:
        raise PolicyError(f"plan: schema is {table.get('schema')!r}, this version reads {SCHEMA}")
    steps = tuple(
        _read_step(entry, f"plan, steps[{index}]", transforms)
        for index, entry in enumerate(_list(table.get("steps"), "plan, steps"))
    )
    _check_overlap(steps)
    refusals = []
    for index, entry in enumerate(_list(table.get("refusals", []), "plan, refusals")):
        values = _table(entry, f"plan, refusals[{index}]", _REFUSAL_KEYS)
        refusals.append(Refusal(**{"code": "", "reason": "", **values}))
    versions = table.get("versions", {})
    if not isinstance(versions, dict):
        raise PolicyError(f"plan, versions: {versions!r} is no table")
    policy = _text(table.get("policy", ""), "plan, policy")
    held = read_tables(table.get("tables"), tables)
    return Plan(steps, tuple(refusals), policy, versions, held)


def _table(value: object, place: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PolicyError(f"{place}: found {value!r}, expected a table with {', '.join(known)}")
    for key in value:
        if key not in known:
            raise PolicyError(f"{place}: unknown key {key!r}{suggest(str(key), known)}")
    return value


def _list(value: object, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise PolicyError(f"{place}: found {value!r}, expected a list")
    return value


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise PolicyError(f"{place}: found {value!r}, expected a text")
    return value


def _read_step(entry: object, place: str, transforms: Transforms | None) -> Step:
    table = _table(entry, place, _STEP_KEYS)
    parts = _list(table.get("transforms"), f"{place}.transforms")
    if not parts:
        raise PolicyError(
            f'{place}.transforms is empty; write ["keep"] to leave the Site untouched'
        )
    pipeline: list[Transform] = []
    for index, part in enumerate(parts):
        where = f"{place}.transforms[{index}]"
        try:
            pipeline += parse_pipeline(_text(part, where), transforms)
        except PolicyError as error:
            raise PolicyError(f"{where}: {error}") from None
    kinds = _list(table.get("named_kinds", []), f"{place}.named_kinds")
    for kind in kinds:
        if kind not in KINDS:
            raise PolicyError(
                f"{place}.named_kinds: unknown kind {kind!r}{suggest(str(kind), KINDS)}"
            )
    step = Step(
        _text(table.get("site"), f"{place}.site"),
        tuple(pipeline),
        _heads(table.get("heads"), place),
        tuple(kinds),
        _text(table.get("note", ""), f"{place}.note"),
        _tiles(table.get("tiles"), place),
    )
    said = table.get("exactness", step.exactness.value)
    if said != step.exactness.value:
        raise PolicyError(
            f"{place}.exactness says {said!r}, but {step.text} is {step.exactness.value}; "
            "correct it or leave it out"
        )
    return step


def _heads(value: object, place: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    heads = _list(value, f"{place}.heads")
    if not heads or not all(
        isinstance(h, int) and not isinstance(h, bool) and h >= 0 for h in heads
    ):
        raise PolicyError(
            f"{place}.heads: found {value!r}, expected null or a list of head numbers"
        )
    return tuple(sorted(set(heads)))


def _tiles(value: object, place: str) -> tuple[int, int] | None:
    if value is None:
        return None
    table = _table(value, f"{place}.tiles", ("executed", "total"))
    counts = (table.get("executed"), table.get("total"))
    if not all(isinstance(c, int) for c in counts):
        raise PolicyError(f"{place}.tiles: found {value!r}, expected executed and total counts")
    return counts  # type: ignore[return-value]


def _check_overlap(steps: tuple[Step, ...]) -> None:
    """One head is rewritten by one step."""
    seen: dict[str, set[int] | None] = {}
    for index, step in enumerate(steps):
        before = seen.get(step.site, set())
        heads = None if step.heads is None else set(step.heads)
        if step.site in seen and (before is None or heads is None or before & heads):
            raise PolicyError(f"plan, steps[{index}]: {step.site} has two steps for the same head")
        seen[step.site] = None if heads is None or before is None else before | heads
