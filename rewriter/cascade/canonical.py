"""Equality of cascades up to names and order, and a difference that a person can read.

`normal_form` gives ranks and intermediates canonical names, sorts the operands of commutative
operators and independent Einsums.  Inputs and outputs keep their names: they are how a caller binds
a cascade.  Sums and products are not reassociated, because that rounds differently.

Names are found as in graph isomorphism tests, by colour refinement: every rank and tensor gets a
colour from what it is used for, refined until it no longer splits classes.  Two cascades that are
equal up to names therefore get the same form unless they have different ranks or tensors that no
use tells apart.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from attn_rewrite.cascade.expr import (
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Read,
    conjunction,
    conjuncts,
    rebuild,
    transform,
    walk,
)
from attn_rewrite.cascade.infer import einsums_of, reads
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, Statement, TensorDecl
from attn_rewrite.cascade.rename import Names

_COMMUTATIVE = frozenset({"add", "mul", "max", "min", "and", "or", "eq", "ne"})
_ASSOCIATIVE = frozenset({"max", "min", "and", "or"})
_MIRRORED = {"gt": "lt", "ge": "le"}


def normal_form(cascade: Cascade) -> Cascade:
    """The same cascade with canonical names and order; equal for cascades equal up to those."""
    colours = _refined(cascade)
    body = tuple(_normal_statement(s, colours) for s in _sorted(cascade.body, colours))
    named = _fresh_names(cascade, body).cascade(replace(cascade, body=body, name=""))
    return _arranged(named)


def equivalent(a: Cascade, b: Cascade) -> bool:
    """Are the cascades equal up to the names of ranks and intermediates and to order?"""
    return normal_form(a) == normal_form(b)


def diff(a: Cascade, b: Cascade) -> str:
    """What changes from ``a`` to ``b``, one line per Einsum or declaration; empty if nothing does.

    Names that ``b`` merely changed are listed as renamings and do not count as changes.
    """
    if a == b:
        return ""
    renames = _renamings(a, b)
    lines = [f"cascade {a.name} -> {b.name}" if a.name != b.name else f"cascade {a.name}"]
    called = {**renames.ranks, **renames.tensors}
    lines += [f"  {new} is called {old} in {a.name}" for new, old in called.items()]
    left, right = _lines(a), _lines(renames.cascade(b))
    changes = list(_changes(left, right))
    if not changes:
        lines.append("  the same up to names")
    elif equivalent(a, b):
        lines.append("  the same up to names and order")
    return "\n".join([*lines, *changes])


def _lines(cascade: Cascade) -> list[str]:
    return [line for line in str(replace(cascade, name="")).splitlines()[1:] if line.strip()]


def _changes(left: list[str], right: list[str]) -> Iterator[str]:
    """Removed and added lines; what stays in between is counted."""
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    blocks = matcher.get_opcodes()
    if all(kind == "equal" for kind, *_ in blocks):
        return
    for kind, i1, i2, j1, j2 in blocks:
        if kind == "equal":
            yield f"  ({i2 - i1} unchanged)"
            continue
        yield from (f"- {line.strip()}" for line in left[i1:i2])
        yield from (f"+ {line.strip()}" for line in right[j1:j2])


def _renamings(a: Cascade, b: Cascade) -> Names:
    """Names of ``b`` for what ``a`` calls otherwise, where colours pair them one to one.

    The finest colours pair first; what a change has recoloured is paired by coarser ones.
    """
    first, second = _stages(a), _stages(b)
    ranks: dict[str, str] = {}
    tensors: dict[str, str] = {}
    for mine, theirs in reversed(list(zip(first, second, strict=False))):
        _pair(mine.ranks, theirs.ranks, ranks)
        if mine is not first[0]:  # the first colours know nothing of intermediates
            _pair(mine.tensors, theirs.tensors, tensors)
    return Names(_without_collisions(ranks), _without_collisions(tensors))


def _pair(mine: Mapping[str, str], theirs: Mapping[str, str], found: dict[str, str]) -> None:
    """Add to ``found`` the pairs (their name, my name) that alone have their colour."""
    old, new = (
        {c: [n for n in names if names[n] == c and n not in taken] for c in set(names.values())}
        for names, taken in ((mine, found.values()), (theirs, found.keys()))
    )
    for colour, names in new.items():
        if len(names) == 1 and len(old.get(colour, ())) == 1:
            found[names[0]] = old[colour][0]


def _without_collisions(pairs: dict[str, str]) -> dict[str, str]:
    """Only real renamings, and none to a name that another thing keeps."""
    changed = {new: old for new, old in pairs.items() if new != old}
    while True:
        kept = {n: o for n, o in changed.items() if o not in pairs or o in changed}
        if len(kept) == len(changed):
            return kept
        changed = kept


@dataclass(frozen=True)
class _Colours:
    """What tells ranks and tensors apart, as digests without any name of theirs."""

    ranks: Mapping[str, str]
    tensors: Mapping[str, str]

    def key(self, expr: Expr, marked: str | None = None) -> str:
        """A digest of ``expr`` without names; ``marked`` is one rank to tell from its peers."""
        match expr:
            case Const(value):
                return f"{type(value).__name__} {value!r}"
            case Rank(name) | Extent(name):
                mark = "!" if name == marked else ""
                return f"{type(expr).__name__} {self.ranks.get(name, name)}{mark}"
            case Read(tensor, index):
                inner = ", ".join(self.key(i, marked) for i in index)
                return _digest("read", self.tensors.get(tensor, tensor), inner)
            case Call(op, args):
                keys = [self.key(a, marked) for a in args]
                if op in _MIRRORED:
                    op, keys = _MIRRORED[op], keys[::-1]
                if op in _ASSOCIATIVE:
                    keys = [self.key(a, marked) for a in _operands(op, expr)]
                return _digest(op, *(sorted(keys) if op in _COMMUTATIVE else keys))
        raise TypeError(f"not an expression: {expr!r}")

    def einsum(self, e: Einsum, marked: str | None = None) -> str:
        """A digest of an Einsum."""
        reduce = [(self.ranks[r] + "!" * (r == marked), op) for r, op in _reductions(e)]
        guard = sorted(self.key(t, marked) for t in conjuncts(e.guard))
        return _digest(self.key(e.out, marked), self.key(e.expr, marked), str(reduce), *guard)


def _digest(*parts: str) -> str:
    return hashlib.sha1("\0".join(parts).encode(), usedforsecurity=False).hexdigest()


def _operands(op: str, expr: Expr) -> list[Expr]:
    if isinstance(expr, Call) and expr.op == op:
        return [o for a in expr.args for o in _operands(op, a)]
    return [expr]


def _reductions(e: Einsum) -> tuple[tuple[str, str], ...]:
    """The reductions, without those that only say what an omitted one means."""
    return () if all(op == "add" for _, op in e.reduce) else e.reduce


def _start(cascade: Cascade) -> _Colours:
    """Inputs and outputs are known by name, ranks by the input dimensions they are."""
    uses: dict[str, list[str]] = {r.name: [str(r.size)] for r in cascade.ranks}
    for statement in cascade.body:
        if isinstance(statement, Loop):
            uses.setdefault(statement.rank, []).append("loop")
    for t in cascade.inputs:
        for d, rank in enumerate(t.ranks):
            uses.setdefault(rank, []).append(f"{t.name} {d}")
    for e in cascade.einsums():
        for name in _rank_names(e):
            uses.setdefault(name, [])
    known = {t.name for t in cascade.inputs} | set(cascade.outputs)
    tensors = {t.name: t.name for t in cascade.inputs}
    for e in cascade.einsums():
        tensors[e.out.tensor] = e.out.tensor if e.out.tensor in known else "intermediate"
    return _Colours({n: _digest(*sorted(u)) for n, u in uses.items()}, tensors)


def _stages(cascade: Cascade) -> list[_Colours]:
    """Colours from the first to those that split no class any more."""
    stages = [_start(cascade)]
    while True:
        stages.append(_refine(cascade, stages[-1]))
        before, after = (len({*c.ranks.values(), *c.tensors.values()}) for c in stages[-2:])
        if before == after:
            return stages


def _refined(cascade: Cascade) -> _Colours:
    return _stages(cascade)[-1]


def _refine(cascade: Cascade, colours: _Colours) -> _Colours:
    made: dict[str, list[str]] = {n: [c] for n, c in colours.tensors.items()}
    used: dict[str, list[str]] = {n: [c] for n, c in colours.ranks.items()}
    for place, e in _placed(cascade, colours):
        made.setdefault(e.out.tensor, []).append(place + colours.einsum(e))
        for rank in _rank_names(e):
            used[rank].append(place + colours.einsum(e, marked=rank))
        for read in reads(e):
            made.setdefault(read.tensor, []).append(f"read {colours.tensors.get(e.out.tensor)}")
    for t in cascade.tensors:
        made.setdefault(t.name, []).append(f"{t.default} {t.dtype} {t.sign} {t.scale}")
    for r in cascade.ranks:
        for d, part in enumerate(r.parts):
            used.setdefault(r.name, []).append(f"part {d} {colours.ranks.get(part)}")
            used.setdefault(part, []).append(f"of {d} {colours.ranks.get(r.name)}")
    fixed = {t.name for t in cascade.inputs} | set(cascade.outputs)
    return _Colours(
        {n: _digest(u[0], *sorted(u[1:])) for n, u in used.items()},
        {n: n if n in fixed else _digest(m[0], *sorted(m[1:])) for n, m in made.items()},
    )


def _placed(cascade: Cascade, colours: _Colours) -> Iterator[tuple[str, Einsum]]:
    for s in cascade.body:
        if isinstance(s, Loop):
            where = f"{colours.ranks[s.rank]} {s.descending}"
            yield from ((f"init {where}", e) for e in s.init)
            yield from ((f"body {where}", e) for e in s.body)
        else:
            yield "", s


def _rank_names(e: Einsum) -> list[str]:
    """Ranks by coordinate or extent, in order of appearance."""
    nodes = [n for part in (e.out, e.expr, e.guard) for n in walk(part)]
    names = [
        n.name if isinstance(n, Rank) else n.rank for n in nodes if isinstance(n, Rank | Extent)
    ]
    return list(dict.fromkeys([*names, *(r for r, _ in e.reduce)]))


# Order


def _sorted(body: tuple[Statement, ...], colours: _Colours) -> list[Statement]:
    """Statements in topological order, the independent ones by colour."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(body)))
    for later, second in enumerate(body):
        for earlier, first in enumerate(body[:later]):
            if _written(first) & (_read(second) | _written(second)) or _read(first) & _written(
                second
            ):
                graph.add_edge(earlier, later)

    def key(n: int) -> tuple[str, int]:
        s = body[n]
        if isinstance(s, Einsum):
            return colours.einsum(s), n
        return _digest(*(colours.einsum(e) for e in (*s.init, *s.body))), n

    return [body[n] for n in nx.lexicographical_topological_sort(graph, key)]


def _written(s: Statement) -> set[str]:
    return {e.out.tensor for e in einsums_of(s)}


def _read(s: Statement) -> set[str]:
    return {r.tensor for e in einsums_of(s) for r in reads(e)}


def _normal_statement(s: Statement, colours: _Colours) -> Statement:
    if isinstance(s, Loop):
        init = (_normal_statement(e, colours) for e in _sorted(s.init, colours))
        body = (_normal_statement(e, colours) for e in _sorted(s.body, colours))
        einsums = [tuple(e for e in part if isinstance(e, Einsum)) for part in (init, body)]
        return replace(s, init=einsums[0], body=einsums[1])

    def ordered(node: Expr) -> Expr | None:
        return _ordered(node, colours)

    guard = sorted((transform(t, ordered) for t in conjuncts(s.guard)), key=colours.key)
    out = rebuild(s.out, tuple(transform(i, ordered) for i in s.out.index))
    assert isinstance(out, Read)
    expr = transform(s.expr, ordered)
    return Einsum(out, expr, _reductions(s), conjunction(tuple(dict.fromkeys(guard))))


def _ordered(node: Expr, colours: _Colours) -> Expr | None:
    """A call with its operands in canonical order."""
    if not isinstance(node, Call):
        return None
    if node.op in _MIRRORED:
        return Call(_MIRRORED[node.op], node.args[::-1])
    if node.op in _ASSOCIATIVE:
        first, *rest = sorted(_operands(node.op, node), key=colours.key)
        for operand in rest:
            first = Call(node.op, (first, operand))
        return first
    if node.op in _COMMUTATIVE:
        return Call(node.op, tuple(sorted(node.args, key=colours.key)))
    return None


# Names


def _fresh_names(cascade: Cascade, body: tuple[Statement, ...]) -> Names:
    """``r0, r1, ...`` for ranks and ``t@0, t@1, ...`` for intermediates, by first appearance."""
    kept = {t.name for t in cascade.inputs} | set(cascade.outputs)
    ranks: dict[str, None] = {}
    tensors: dict[str, None] = {}
    for t in sorted(cascade.inputs, key=lambda t: t.name):
        ranks.update(dict.fromkeys(t.ranks))
    for s in body:
        for e in einsums_of(s):
            ranks.update(dict.fromkeys(_rank_names(e)))
            if e.out.tensor not in kept:
                tensors[e.out.tensor] = None
    ranks.update(dict.fromkeys(r.name for r in cascade.ranks))
    return Names(
        {n: f"r{i}" for i, n in enumerate(ranks)}, {n: f"t@{i}" for i, n in enumerate(tensors)}
    )


def _arranged(cascade: Cascade) -> Cascade:
    """Declarations in the order of the canonical names; those that say nothing are left out."""
    plain = TensorDecl("", ())
    tensors = [t for t in cascade.tensors if replace(t, name="", ranks=()) != plain]
    return replace(
        cascade,
        ranks=tuple(sorted(cascade.ranks, key=lambda r: int(r.name[1:]))),
        inputs=tuple(sorted(cascade.inputs, key=lambda t: t.name)),
        outputs=tuple(sorted(cascade.outputs)),
        tensors=tuple(sorted(tensors, key=lambda t: t.name)),
    )
