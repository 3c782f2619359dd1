"""Cascades of Einsums: the value every attention is raised to, rewritten as and lowered from.

A cascade is a sequence of Einsums over named ranks.  An Einsum maps an expression over its
iteration space (the product of all ranks that occur, restricted by its guard) and reduces the ranks
that the output does not carry.  Points outside the guard are not touched: the output keeps its
*default* there, which is the identity of the reduction that reads it (0 for +, -inf for max).

Source: extended Einsums as used by FuseMax (Nayak et al., MICRO 2024), section II.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from attn_rewrite.cascade.expr import TRUE, Expr, Read, conjuncts, walk

# Names under which users may ask for the key and query ranks (paper notation <-> graph notation).
ALIASES = {"m": "kv", "kv": "m", "p": "q", "q": "p"}


@dataclass(frozen=True)
class RankDecl:
    """A rank; ``size`` is its extent where it is fixed, ``parts`` the sub-ranks it is split into.

    ``parts`` lists (outer, inner): coordinate = outer * extent(inner) + inner.
    """

    name: str
    size: int | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorDecl:
    """A tensor: its ranks in order, the value of points nobody wrote, and its type.

    ``dtype`` is ``"float"`` (the model's), or a fixed type (``"f32"``, ``"i8"``, ``"bool"``,
    ``"i64"``); ``scale`` names the tensor holding quantisation scales, if any.  ``sign`` is
    ``"positive"``, ``"nonnegative"`` or ``"any"`` and is used by proofs.
    """

    name: str
    ranks: tuple[str, ...]
    default: float = 0.0
    dtype: str = "float"
    sign: str = "any"
    scale: str | None = None


@dataclass(frozen=True)
class Einsum:
    """``out = expr`` over the points of the guard, ranks missing from ``out`` folded by ``reduce``.

    ``out`` is an access with index expressions (plain ranks, affine such as ``m1 + 1``, or fixed
    such as ``#m1``).  ``reduce`` maps each reduced rank to ``add | max | min | mul | or | and``;
    ranks left out of it are summed, and before the others.
    """

    out: Read
    expr: Expr
    reduce: tuple[tuple[str, str], ...] = ()
    guard: Expr = TRUE

    def reads(self) -> tuple[Read, ...]:
        """Tensor reads of the expression, in order."""
        return tuple(n for n in walk(self.expr) if isinstance(n, Read))

    def __str__(self) -> str:
        from attn_rewrite.cascade.text import einsum_to_text

        return einsum_to_text(self)


@dataclass(frozen=True)
class Loop:
    """An iterative (generative) rank: ``init`` once, then ``body`` for each coordinate in order.

    The rank has extent + 1 coordinates in the tensors that carry state; ``descending`` runs it from
    the last coordinate to the first.
    """

    rank: str
    init: tuple[Einsum, ...]
    body: tuple[Einsum, ...]
    descending: bool = False


Statement = Einsum | Loop


@dataclass(frozen=True)
class Cascade:
    """A named cascade of Einsums: printable, parseable, comparable, hashable.

    ``inputs`` come from outside, ``tensors`` declares every other tensor that needs more than the
    defaults, ``outputs`` are the results by name.
    """

    name: str
    ranks: tuple[RankDecl, ...]
    inputs: tuple[TensorDecl, ...]
    body: tuple[Statement, ...]
    outputs: tuple[str, ...]
    tensors: tuple[TensorDecl, ...] = field(default=())

    def einsums(self) -> Iterator[Einsum]:
        """Every Einsum in program order, loop bodies included."""
        for statement in self.body:
            if isinstance(statement, Loop):
                yield from statement.init
                yield from statement.body
            else:
                yield statement

    def producer(self, tensor: str) -> Einsum | None:
        """The last Einsum that writes ``tensor``; None for inputs."""
        return next((e for e in reversed(tuple(self.einsums())) if e.out.tensor == tensor), None)

    def rank(self, name: str) -> str:
        """Resolve a rank name, its alias (``p`` = ``q``, ``m`` = ``kv``) or its other case.

        The paper writes ranks in capitals and their coordinates in small letters: ``M`` is ``m``.
        Raises `ValueError` for a name that is none of these.
        """
        if not isinstance(name, str):
            raise TypeError(f"a rank is named by a str, got {type(name).__name__} {name!r:.40}")
        known = {r.name: r.name for r in self.ranks}
        folded = {r.name.lower(): r.name for r in reversed(self.ranks)}
        for names, asked in ((known, name), (folded, name.lower())):
            for candidate in (asked, ALIASES.get(asked, asked)):
                if candidate in names:
                    return names[candidate]
        raise ValueError(
            f"cascade {self.name} has no rank {name!r}; it has {', '.join(sorted(known)) or 'none'}"
        )

    def with_body(self, *body: Statement) -> Cascade:
        """The same cascade with other statements; the same object if they are equal."""
        return self if body == self.body else replace(self, body=body)

    def guard_terms(self) -> tuple[Expr, ...]:
        """Conjuncts of every guard in the cascade, each once."""
        return tuple(dict.fromkeys(t for e in self.einsums() for t in conjuncts(e.guard)))

    def __str__(self) -> str:
        from attn_rewrite.cascade.text import cascade_to_text

        return cascade_to_text(self)


def checked(value: object) -> Cascade:
    """``value`` if it is a cascade; the functions people call with a name or a text say so.

    Raises `TypeError`.
    """
    if isinstance(value, Cascade):
        return value
    raise TypeError(
        f"expected a Cascade, got {type(value).__name__} {value!r:.40}; use parse(text) for a text "
        "and NAMED[name] for a name"
    )
