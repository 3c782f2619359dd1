"""What will be done to which Site: a Plan of Steps made from a policy, replayable as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_rewrite.passes.keep import Exact, Keep
from attn_rewrite.passes.quantize.base import Quantisation
from attn_rewrite.passes.reorder.reorder import Reorder
from attn_rewrite.passes.sparse.blocks import Blocks
from attn_rewrite.passes.sparse.laid_out import LaidOut
from attn_rewrite.passes.transform import Exactness, ScoreEdit, Transform, spans_text
from attn_rewrite.plan_checks import check_policy
from attn_rewrite.policy import Policy, Rule, pipeline_text
from attn_rewrite.policy_text import Transforms
from attn_rewrite.site import Refusal
from attn_rewrite.tables import Table, describe

if TYPE_CHECKING:
    from attn_rewrite.cascade.ir import Cascade
    from attn_rewrite.site import Findings, Site

SCHEMA = 1
_ORDER = (Exactness.EXACT, Exactness.REASSOCIATED, Exactness.APPROXIMATE)


@dataclass(frozen=True)
class Step:
    """Transforms for one Site, or for some of its query heads (``heads`` None: all).

    ``named_kinds`` are the kinds that the user's rule names explicitly; ``tiles`` is the expected
    (executed, total) number of score tiles of the whole Site for one batch entry where lengths are
    fixed, else None.
    """

    site: str
    transforms: tuple[Transform, ...]
    heads: tuple[int, ...] | None = None
    named_kinds: tuple[str, ...] = ()
    note: str = ""
    tiles: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def exactness(self) -> Exactness:
        """The weakest promise among the transforms."""
        return max((t.exactness for t in self.transforms), key=_ORDER.index)

    @property
    def keeps(self) -> bool:
        """True when every transform is `keep`: the Site is left untouched."""
        return all(isinstance(t, Keep) for t in self.transforms)

    @property
    def text(self) -> str:
        """The pipeline as policies write it."""
        return pipeline_text(self.transforms)

    @property
    def label(self) -> str:
        """The pipeline with the heads it is for: ``heads 0-3: window(size=256)``."""
        return self.text if self.heads is None else f"heads {spans_text(self.heads)}: {self.text}"

    def __str__(self) -> str:
        return f"{self.site}: {self.label}" + (f"  ({self.note})" if self.note else "")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "site": self.site,
            "transforms": [str(t) for t in self.transforms],
            "heads": None if self.heads is None else list(self.heads),
            "named_kinds": list(self.named_kinds),
            "exactness": self.exactness.value,
            "note": self.note,
            "tiles": None
            if self.tiles is None
            else {"executed": self.tiles[0], "total": self.tiles[1]},
        }


@dataclass(frozen=True)
class Plan:
    """Steps in the order of the graph, and a Refusal for everything asked but not done."""

    steps: tuple[Step, ...]
    refusals: tuple[Refusal, ...] = ()
    policy: str = ""
    versions: Mapping[str, str] = field(default_factory=dict, compare=False)
    tables: Mapping[str, Table] = field(default_factory=dict, compare=False)

    def tables_of(self, site: Site, cascade: Cascade) -> dict[str, Table] | Refusal:
        """The tables that ``cascade``, rewritten for ``site``, reads besides its operands.

        In the order of the cascade's inputs; a Refusal where one is missing or measures wrong.
        """
        read = [t.name for t in cascade.inputs if t.name not in site.inputs]
        own = {t.name for t in site.cascade.inputs}
        found: dict[str, Table] = {}
        lists = [t for s in self.of(site.name) for t in s.transforms if isinstance(t, Blocks)]
        for name in (n for n in read if n not in own):
            table = self.tables.get(f"{site.name}/{name}")
            shapes = {t.shape(site) for t in lists if t.table == name}
            if table is None or {table.shape} != shapes:
                what = "has none" if table is None else f"has one of {list(table.shape)}"
                reason = f"{site.name} reads the table {name} of {shapes}, and the plan {what}"
                anchor = str(site.anchor or "")
                return Refusal("table-missing", reason, anchor, site.source, site.name)
            found[name] = table
        return found

    def of(self, site: str) -> tuple[Step, ...]:
        """The steps of a Site, one per group of heads."""
        return tuple(s for s in self.steps if s.site == site)

    def among(self, sites: Collection[str]) -> Plan:
        """What is planned for ``sites`` alone."""
        steps = tuple(s for s in self.steps if s.site in sites)
        return replace(
            self, steps=steps, refusals=tuple(r for r in self.refusals if r.site in sites)
        )

    def exactness_of(self, site: str) -> Exactness:
        """The weakest promise among the steps of a Site."""
        promises = (s.exactness for s in self.of(site))
        return max(promises, default=Exactness.EXACT, key=list(Exactness).index)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @property
    def hash(self) -> str:
        """SHA-256 of what the plan does: equal plans rewrite equally, whatever their notes say."""
        what: list[Any] = [[s.site, s.text, s.heads, s.named_kinds] for s in self.steps]
        what += [describe(self.tables)] if self.tables else []
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.steps, *self.refusals)))

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return {
            "schema": SCHEMA,
            "policy": self.policy,
            "versions": dict(self.versions),
            "hash": self.hash,
            "tables": describe(self.tables),
            "steps": [s.to_json() for s in self.steps],
            "refusals": [r.to_json() for r in self.refusals],
        }

    def dumps(self) -> str:
        """The plan as a JSON document."""
        return json.dumps(self.to_json(), indent=2) + "\n"

    @classmethod
    def from_json(
        cls, data: object, transforms: Transforms | None = None, tables: Path | None = None
    ) -> Plan:
        """Read plain values or a JSON document; editing steps by hand is allowed.

        ``tables`` is the file that holds the tables of the plan, if it has any.  Raises
        `PolicyError` that names the entry and what was expected there.
        """
        from attn_rewrite.plan_json import read_plan

        return read_plan(data, transforms, tables)

    def without(self, sites: Iterable[str], refusal: Refusal | None = None) -> Plan:
        """The plan with the steps of ``sites`` replaced by ``exact`` (they went over a budget)."""
        gone = set(sites)
        steps = []
        for step in self.steps:
            if step.site not in gone:
                steps.append(step)
            elif step.site not in {s.site for s in steps}:
                steps.append(Step(step.site, (Exact(),), note="sent back to exact by a budget"))
        extra = () if refusal is None else (refusal,)
        return replace(self, steps=tuple(steps), refusals=self.refusals + extra)


def make_plan(
    findings: Findings, policy: Policy, versions: Mapping[str, str] | None = None
) -> Plan:
    """Decide for every Site and head; the first rule that matches wins.

    A Site that no rule matches, or on which a transform is refused, gets a `keep` step; the refusal
    is in ``plan.refusals``.  A layer glob that matches no Site, and a head that no Site of the rule
    has, are `PolicyError`.
    """
    check_policy(findings, policy)
    steps: list[Step] = []
    refusals: list[Refusal] = []
    used: set[int] = set()
    for site in findings.sites:
        groups, refusal = _assign(site, policy)
        used.update(index for index, _ in groups if index is not None)
        planned, more = _plan_site(site, policy, groups) if refusal is None else ((), (refusal,))
        refusals += more
        steps += planned or (_kept(site, more),)
    refusals += _unused(policy, used) if findings.sites else []
    return Plan(tuple(steps), tuple(refusals), str(policy), dict(versions or {}))


Groups = list[tuple[int | None, tuple[int, ...] | None]]


def _kept(site: Site, refusals: Iterable[Refusal]) -> Step:
    return Step(site.name, (Keep(),), note=", ".join(dict.fromkeys(r.code for r in refusals)))


def _assign(site: Site, policy: Policy) -> tuple[Groups, Refusal | None]:
    """Rule index and heads of each group (None: no rule; None: all heads)."""
    left = set(range(site.hq))
    groups: Groups = []
    for index, rule in enumerate(policy.rules):
        if not left:
            break
        heads = left if rule.where.heads is None else left.intersection(rule.where.heads)
        if not heads or not rule.where.matches(site):
            continue
        holds = _length_holds(rule, site)
        if holds is None:
            return [], _length_refusal(rule, site, index)
        if holds:
            groups.append((index, tuple(sorted(heads))))
            left = left - heads
    if left:
        groups.append((None, tuple(sorted(left))))
    if len(groups) == 1:
        groups = [(groups[0][0], None)]
    return groups, None


def _length_holds(rule: Rule, site: Site) -> bool | None:
    if rule.where.length is None:
        return True
    return rule.where.length.holds(*length_bounds(site.kv_len))


def length_bounds(size: Any) -> tuple[int, int | None]:
    """Smallest and largest value of a size: itself, or what is known of a dynamic one."""
    if isinstance(size, int):
        return size, size
    node = getattr(size, "node", None)
    shapes = getattr(node, "shape_env", None)
    if node is None or shapes is None:
        return 0, None
    known = shapes.bound_sympy(node.expr)
    # An open upper end is an infinity object of sympy or of torch, or the largest machine integer.
    high = int(known.upper) if known.upper.is_Integer and int(known.upper) < 2**62 else None
    return (int(known.lower) if known.lower.is_Integer else 0), high


def _length_refusal(rule: Rule, site: Site, index: int) -> Refusal:
    low, high = length_bounds(site.kv_len)
    reason = (
        f"rule {index + 1} is for lengths {rule.where.length}, but this length is dynamic "
        f"({low} to {'any' if high is None else high}); capture with a range that lies inside"
    )
    return Refusal("length-dynamic", reason, str(site.anchor or ""), site.source, site.name)


def _plan_site(
    site: Site, policy: Policy, groups: Groups
) -> tuple[tuple[Step, ...], tuple[Refusal, ...]]:
    """The steps of a Site, or why it is kept."""
    steps = tuple(_step(site, policy, index, heads) for index, heads in groups)
    if all(step.keeps for step in steps):
        return (replace(steps[0], heads=None),), ()
    if site.refusals:
        return (), tuple(replace(r, site=r.site or site.name) for r in site.refusals)
    result = rewritten(site, *steps)
    if isinstance(result, Refusal):
        return (), (result,)
    tiles = expected_tiles(site, result)
    steps = tuple(replace(s, tiles=tiles) for s in steps)
    if len(steps) > 1:
        together = "the other heads are rewritten, so these are computed exactly beside them"
        steps = tuple(replace(s, note=together) if s.keeps else s for s in steps)
    return steps, ()


def expected_tiles(
    site: Site,
    cascade: Cascade,
    block: int = 128,
    tables: Mapping[str, Table] | None = None,
) -> tuple[int, int] | None:
    """(kept, all) tiles of ``block`` x ``block`` scores over the query heads of one batch entry.

    None where a length is dynamic or the cascade is no softmax attention.
    """
    from attn_rewrite.backends.torch.schedule import make_schedule
    from attn_rewrite.cascade.staged import attention_form

    form = attention_form(cascade)
    q_len, kv_len = site.q_len, site.kv_len
    if form is None or not isinstance(q_len, int) or not isinstance(kv_len, int):
        return None
    schedule = make_schedule(
        form.guard,
        q_len=q_len,
        kv_len=kv_len,
        block=block,
        heads=site.hq,
        group=form.group,
        tables=tables,
    )
    counts = schedule.counts()
    return counts.executed, counts.total


def _step(site: Site, policy: Policy, index: int | None, heads: tuple[int, ...] | None) -> Step:
    if index is None:
        return Step(site.name, (Keep(),), heads, note="no rule matches")
    rule = policy.rules[index]
    return Step(site.name, rule.apply, heads, rule.where.kind)


def rewritten(site: Site, *steps: Step) -> Cascade | Refusal:
    """The cascade of ``site`` after the transforms of its steps, in order.

    The same object as ``site.cascade`` when nothing changes; the first Refusal of a transform
    otherwise.  `ValueError` for a step of another Site.
    """
    cascade = site.cascade
    for step in steps:
        if step.site != site.name:
            raise ValueError(f"a step for {step.site} was applied to {site.name}")
        here = site
        for number, transform in enumerate(step.transforms):
            refusal = transform.admits(here, step.named_kinds)
            refusal = refusal or _too_late(site, step.transforms[:number], transform)
            if refusal is not None:
                return refusal
            if step.heads is None or len(step.heads) == site.hq:
                result = transform.apply(cascade, here)
            else:
                result = transform.apply_to_heads(cascade, here, step.heads)
            if isinstance(result, Refusal):
                return result
            cascade, here = result, transform.after(here)
    return cascade


def approximate_parts(site: Site, steps: Sequence[Step]) -> tuple[tuple[str, Cascade], ...]:
    """The approximate parts of a pipeline, each with the cascade that stands after it.

    A part is an approximate transform with the exact ones before it.  Empty for pipelines with
    fewer than two, where there is nothing to tell apart.
    """
    longest = max((len(s.transforms) for s in steps), default=0)
    ends = [
        n
        for n in range(1, longest + 1)
        if any(s.transforms[n - 1 : n] and _approximates(s.transforms[n - 1]) for s in steps)
    ]
    if len(ends) < 2:
        return ()
    parts: list[tuple[str, Cascade]] = []
    start = 0
    for end in ends:
        until = longest if end == ends[-1] else end
        cascade = rewritten(site, *(replace(s, transforms=s.transforms[:until]) for s in steps))
        if isinstance(cascade, Refusal):
            return ()
        texts = (pipeline_text(s.transforms[start:until]) for s in steps if s.transforms[start:])
        parts.append(("; ".join(dict.fromkeys(texts)), cascade))
        start = until
    return tuple(parts)


def _approximates(transform: Transform) -> bool:
    return transform.exactness is Exactness.APPROXIMATE


def _too_late(site: Site, before: tuple[Transform, ...], transform: Transform) -> Refusal | None:
    """An edit of the score after quantisation: what smoothing took off the score is missing.
    A pattern over the model's grid after a reordering: positions mean something else by then."""
    moved = any(isinstance(t, Reorder) for t in before)
    if moved and isinstance(transform, LaidOut) and transform.reads_grid:
        reason = (
            f"{transform.name} reads the grid of the model, and reorder has moved its tokens; "
            f"write {transform.name} before reorder, or give it the layout of the new order"
        )
        return transform.refuse(site, "reorder-early", reason)
    quantised = next((t for t in before if isinstance(t, Quantisation)), None)
    if quantised is None or not isinstance(transform, ScoreEdit):
        return None
    reason = (
        f"{transform.name} edits a score that {quantised.name} may have shifted already; "
        f"write {transform.name} before {quantised.name}"
    )
    return transform.refuse(site, "edit-after-quantisation", reason)


def _unused(policy: Policy, used: set[int]) -> list[Refusal]:
    return [
        Refusal("rule-unused", f"rule {i + 1} ({rule.text}) matches no Site and head that is left")
        for i, rule in enumerate(policy.rules)
        if i not in used
    ]
