"""What a policy names: transforms of cascades, one per file, listed in `attn_rewrite.passes`.

A new sparse pattern is one file with a subclass of `SparsePattern` (fields and ``mask``) and one
line in ``passes/sparse/__init__.py``; a new edit of the score is one file with a subclass of
`ScoreEdit` and one line in ``passes/edit/__init__.py``.  Policies, plans, heads, verification and
reports follow.
"""

from __future__ import annotations

import enum
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from attn_rewrite.cascade.expr import (
    KV,
    TRUE,
    Call,
    Const,
    Expr,
    H,
    Q,
    call,
    conjunction,
    conjuncts,
    ranks_of,
    where,
)
from attn_rewrite.site import UNKNOWN_OFFSET

if TYPE_CHECKING:
    from attn_rewrite.cascade.ir import Cascade
    from attn_rewrite.site import Refusal, Site


class Exactness(enum.StrEnum):
    """What a pass may do to the numbers."""

    EXACT = "exact"  # the same numbers
    REASSOCIATED = "reassociated"  # the same mathematics, other rounding
    APPROXIMATE = "approximate"  # other mathematics; runs only when the policy names it


# Sums and products of positions and options stay within 64 bits.
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Option:
    """What users are told about a field, and its range: ``size: Annotated[int, Option(...)]``."""

    doc: str = ""
    minimum: float | None = None
    maximum: float | None = None

    def problem(self, value: object) -> str | None:
        """Why ``value`` is out of range, or None."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if not math.isfinite(value):
            return f"is {value}, expected a finite number"
        if isinstance(value, int) and abs(value) > _LARGEST:
            return f"is {value}, expected at most {_LARGEST} in size: positions are 64-bit numbers"
        if self.minimum is not None and not value >= self.minimum:
            return f"is {value}, expected at least {self.minimum}"
        if self.maximum is not None and not value <= self.maximum:
            return f"is {value}, expected at most {self.maximum}"
        return None


@dataclass(frozen=True)
class FieldInfo:
    """One option of a transform: type as text, default as policy text (None: required), meaning."""

    name: str
    type: str
    default: str | None
    doc: str
    hint: Any
    option: Option

    def problem(self, value: object) -> str | None:
        """Why ``value`` cannot be this field, or None."""
        if not accepts(self.hint, value):
            return f"is {literal(value)}, expected {self.type}"
        return self.option.problem(value)


def accepts(hint: Any, value: object) -> bool:
    """Whether a policy value has the type ``hint``: scalars, unions and tuples of them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(a, value) for a in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        items = [a for a in arguments if a is not Ellipsis]
        return isinstance(value, tuple) and all(any(accepts(a, v) for a in items) for v in value)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(hint, type) and isinstance(value, hint)


def type_name(hint: Any) -> str:
    """The type as users read it: ``int``, ``bool or none``, ``list of int``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is typing.Literal:
        return " or ".join(literal(a) for a in arguments)
    if origin is tuple:
        return "list of " + " or ".join(type_name(a) for a in arguments if a is not Ellipsis)
    if hint is None or hint is type(None):
        return "none"
    return getattr(hint, "__name__", str(hint))


def literal(value: object) -> str:
    """A value as it is written in a policy."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(literal(v) for v in value)}]"
    if isinstance(value, Transform):
        return str(value)
    return repr(value)


@dataclass(frozen=True)
class Transform:
    """A rewrite Cascade -> Cascade, or a Refusal that says why not.

    Subclasses are frozen dataclasses whose fields are the options users write in a policy; type and
    range (`Option`) are checked here, what relates several fields in ``__post_init__``
    (`ValueError` with one sentence, after ``super().__post_init__()``).  ``apply`` looks at nothing
    but its arguments.  ``str()`` gives the policy text.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness]
    source: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for info in field_infos(type(self)):
            if problem := info.problem(getattr(self, info.name)):
                raise ValueError(f"{self.name}: {info.name} {problem}")

    def __str__(self) -> str:
        written = [
            f"{f.name}={literal(value)}"
            for f in fields(self)
            if (value := getattr(self, f.name)) != _default(f)
        ]
        return f"{self.name}({', '.join(written)})" if written else self.name

    @property
    def wants_layout(self) -> bool:
        """Does it have a ``layout``, and use it?"""
        return any(f.name == "layout" for f in fields(self))

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """Rewrite ``cascade``; the same object if nothing changes."""
        raise TypeError(f"{type(self).__name__} must define apply()")

    def apply_to_heads(
        self, cascade: Cascade, site: Site, heads: tuple[int, ...]
    ) -> Cascade | Refusal:
        """Rewrite only what the given query heads compute; a Refusal where that has no meaning."""
        return self.refuse(
            site,
            "heads-differ",
            f"{self.name} cannot be limited to heads {spans_text(heads)} of {site.hq}; "
            "name the Site without heads",
        )

    def admits(self, site: Site, named_kinds: tuple[str, ...] = ()) -> Refusal | None:
        """Why the transform has no meaning on ``site``, or None.

        ``named_kinds`` are the kinds of Site that the user's rule names explicitly.
        """
        return None

    def after(self, site: Site) -> Site:
        """The facts of ``site`` as they stand for the transforms that follow in a pipeline."""
        return site

    def _expression(self, method: str, value: object) -> Expr | Refusal:
        """What a subclass's ``method`` gave, if it is what it may give."""
        from attn_rewrite.site import Refusal

        if isinstance(value, Expr | Refusal):
            return value
        raise TypeError(
            f"{self.name}.{method} returned a value of type {type(value).__name__}, expected an "
            "expression (Expr) or a Refusal; a constant is Const(x), equality is eq(a, b)"
        )

    def refuse(self, site: Site, code: str, reason: str) -> Refusal:
        """A Refusal of this transform on ``site``."""
        from attn_rewrite.site import Refusal

        return Refusal(code, reason, str(site.anchor or ""), site.source, site.name)


def _default(f: Any) -> object:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else MISSING


def field_infos(transform: type[Transform]) -> tuple[FieldInfo, ...]:
    """The options of a transform class, in the order of positional arguments, then the others."""
    hints = typing.get_type_hints(transform, include_extras=True)
    infos = []
    for f in sorted(fields(transform), key=lambda f: bool(f.kw_only)):
        hint, option = hints[f.name], Option()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *extras = typing.get_args(hint)
            option = next((e for e in extras if isinstance(e, Option)), option)
        default = _default(f)
        text = None if default is MISSING else literal(default)
        infos.append(FieldInfo(f.name, type_name(hint), text, option.doc, hint, option))
    return tuple(infos)


def spans(heads: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Sorted heads as closed intervals."""
    result: list[tuple[int, int]] = []
    for head in sorted(set(heads)):
        if result and result[-1][1] == head - 1:
            result[-1] = (result[-1][0], head)
        else:
            result.append((head, head))
    return tuple(result)


def spans_text(heads: tuple[int, ...]) -> str:
    """Heads as users write them: ``0-3, 8``."""
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans(heads))


def outside(heads: tuple[int, ...], rank: Expr = H) -> Expr:
    """The mask of all heads but ``heads``."""
    terms = [
        call("ne", rank, a) if a == b else (rank < a) | (rank > b) if a else rank > b
        for a, b in spans(heads)
    ]
    return conjunction(tuple(terms))


def position(site: Site) -> Expr:
    """The position of query ``q`` among the keys."""
    from attn_rewrite.cascade.text import parse_expr

    match parse_expr(site.offset):
        case Const(0):
            return Q
        case Call("sub", (positions, rank)) if rank == Q:
            return positions  # a tensor holds them
        case offset:
            return Q + offset


@dataclass(frozen=True)
class SparsePattern(Transform):
    """A transform that keeps some (q, kv) pairs: subclasses give `mask`, nothing else.

    Which blocks are empty, partial or full is derived from the expression (`cascade.cover`).
    ``positional`` patterns compare the position of a query with that of a key, which has no meaning
    between two sequences unless the user's rule says that it has.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    positional: ClassVar[bool] = True

    def mask(self, site: Site) -> Expr | Refusal:
        """The pairs to keep, over ``b, h, q, kv`` (True = keep)."""
        raise TypeError(f"{type(self).__name__} must define mask()")

    def guard(self, site: Site) -> Expr | Refusal:
        """`mask`, and the causality of the Site.

        A causal mask may be an additive term of the score, which leaves out no block: as a guard
        it does, and it drops nothing that has weight.
        """
        mask = self._expression("mask", self.mask(site))
        if site.causal and site.offset != UNKNOWN_OFFSET and isinstance(mask, Expr):
            return mask & (position(site) >= KV)
        return mask

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """Restrict the iteration space of the cascade to the mask."""
        from attn_rewrite.cascade.attention import restrict

        mask = self.guard(site)
        return restrict(cascade, mask) if isinstance(mask, Expr) else mask

    def apply_to_heads(
        self, cascade: Cascade, site: Site, heads: tuple[int, ...]
    ) -> Cascade | Refusal:
        """Restrict the given heads; every other head keeps what it has."""
        from attn_rewrite.cascade.attention import news, restrict
        from attn_rewrite.cascade.simplify import simplify

        mask = self.guard(site)
        if not isinstance(mask, Expr):
            return mask
        # Term by term, so that what holds for every head already (causality) is not made to look
        # as if it depended on the head.
        rest = outside(heads)
        wanted = news(conjuncts(simplify(mask)), cascade.guard_terms())
        terms = tuple(term | rest for term in wanted)
        return restrict(cascade, conjunction(terms)) if terms else cascade

    def admits(self, site: Site, named_kinds: tuple[str, ...] = ()) -> Refusal | None:
        """Refuse what is no softmax over positions, and positions that cannot be compared."""
        if site.family != "softmax":
            reason = f"{self.name} keeps pairs of positions, but this attention is {site.family}"
            return self.refuse(site, f"{self.name}-{site.family}", reason)
        return _no_positions(self, site, named_kinds) if self.positional else None


def _no_positions(transform: Transform, site: Site, named_kinds: tuple[str, ...]) -> Refusal | None:
    """Why the positions of queries and keys of ``site`` cannot be compared, or None."""
    name = transform.name
    if site.kind == "pooling":
        reason = f"{name} needs positions, but pooling has one learned query"
        return transform.refuse(site, f"{name}-pooling", reason)
    if site.offset == UNKNOWN_OFFSET:
        reason = (
            f"{name} compares positions, but there are {site.q_len} queries for "
            f"{site.kv_len} keys and the graph does not show which key is a query's own"
        )
        return transform.refuse(site, f"{name}-position", reason)
    if site.kind in ("cross", "joint") and site.kind not in named_kinds:
        what = f"this is {site.kind} attention between two sequences"
        remedy = ""
        lengths = (site.q_len, site.kv_len)
        if site.kind == "cross" and not any(isinstance(n, int) for n in lengths):
            what = (
                f"queries and keys have lengths of their own here ({lengths[0]} and {lengths[1]}), "
                "as two sequences have"
            )
            remedy = "give both lengths one Dim in dynamic_shapes where they are one sequence, or "
        reason = (
            f"{name} compares positions, but {what}; {remedy}write "
            f'kind = "{site.kind}" in the rule to say that they are aligned'
        )
        return transform.refuse(site, f"{name}-{site.kind}", reason)
    return None


@dataclass(frozen=True)
class ScoreEdit(Transform):
    """A transform of the score before the softmax: subclasses give `score`, nothing else."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def score(self, s: Expr, site: Site) -> Expr | Refusal:
        """The new score from the old one, over ``b, h, q, kv``."""
        raise TypeError(f"{type(self).__name__} must define score()")

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """Replace the score expression of the cascade."""
        return self.apply_to_heads(cascade, site, ())

    def apply_to_heads(
        self, cascade: Cascade, site: Site, heads: tuple[int, ...]
    ) -> Cascade | Refusal:
        """Replace the score of the given heads (of all heads when there are none named)."""
        from attn_rewrite.cascade.attention import edit_score, score_of

        old = score_of(cascade)
        new = self._expression("score", self.score(old, site))
        if not isinstance(new, Expr):
            return new
        rest = outside(heads)
        return edit_score(cascade, new if rest == TRUE else where(rest, old, new))

    def admits(self, site: Site, named_kinds: tuple[str, ...] = ()) -> Refusal | None:
        """Refuse what has no softmax score, and edits that use positions where there are none."""
        if site.family == "softmax":
            edit = self._expression("score", self.score(Const(0.0), site))
            uses = isinstance(edit, Expr) and ranks_of(edit) & {"q", "kv"}
            return _no_positions(self, site, named_kinds) if uses else None
        reason = f"{self.name} edits softmax scores, but this attention is {site.family}"
        return self.refuse(site, f"{self.name}-{site.family}", reason)


def collect(package: str, entries: tuple[str, ...]) -> Mapping[str, type[Transform]]:
    """The classes of ``"module:Class"`` entries below ``package``, by transform name."""
    import importlib

    table: dict[str, type[Transform]] = {}
    for entry in entries:
        module, _, attribute = entry.partition(":")
        if not attribute.isidentifier():
            raise ValueError(
                f"{package}: the entry {entry!r} is not of the form 'module:Class'; "
                "is a comma missing between two entries?"
            )
        found = getattr(importlib.import_module(f"{package}.{module}"), attribute)
        if found.name in table:
            raise ValueError(f"{package}: two transforms are called {found.name!r}")
        table[found.name] = found
    return table
