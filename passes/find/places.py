"""Which axes of a mixed attention are batch, heads, queries, keys and widths."""

from __future__ import annotations

from dataclasses import dataclass

from attn_rewrite.cascade.expr import ranks_of
from attn_rewrite.passes.find.axes import Atoms, Axes
from attn_rewrite.passes.find.lift import Leaf
from attn_rewrite.passes.find.product import contraction
from attn_rewrite.passes.find.ranks import Places, UnplacedError
from attn_rewrite.passes.find.roles import siblings
from attn_rewrite.passes.find.stages import Stage, StageLifter


@dataclass(frozen=True, eq=False)
class Sources:
    """The tensors that the products of an attention are of, by leaf; one (Q, K) per score."""

    pairs: tuple[tuple[Leaf, Leaf], ...]
    value: Leaf
    widths: tuple[Atoms, ...]
    features: Atoms


def places_of(lifter: StageLifter, root: Stage, sources: Sources) -> Places:
    """Roles by what depends on what.  Raises `UnplacedError` where an axis fits nowhere."""
    axes, keys = lifter.axes, lifter.region.keys
    related = siblings(sources.value.node, sources.value.dims, sources.features, axes)
    for (query, key), width in zip(sources.pairs, sources.widths, strict=True):
        related |= siblings(query.node, query.dims, width, axes)
        related |= siblings(key.node, key.dims, width, axes)
    folded, made = _mixed(lifter, root)
    private = tuple(
        a
        for s in lifter.stages.values()
        for own, d in zip(s.private, s.dims, strict=True)
        if own
        for a in d
    ) + _readers(lifter)
    # The walks above may have split atoms, so everything is resolved from here on.
    of_queries = _resolved([q for q, _ in sources.pairs], axes)
    of_keys = _resolved([*(k for _, k in sources.pairs), sources.value], axes)
    fixed = {*axes.resolve(keys), *axes.resolve(sources.features)}
    fixed |= {a for w in sources.widths for a in axes.resolve(w)}
    related = set(axes.resolve(tuple(related)))
    mixed = {*axes.resolve(folded), *axes.resolve(made), *axes.resolve(private)}
    everything = tuple(
        dict.fromkeys(
            a
            for s in lifter.stages.values()
            for a in axes.resolve((*s.atoms, *s.folded))
            if a not in fixed
        )
    )
    alone = {a for a in of_queries if a not in of_keys and a not in related}
    positions = alone - set(axes.resolve(made))
    if positions & mixed:
        raise UnplacedError  # positions are mixed, not heads
    queries = tuple(a for a in everything if a in positions)
    heads = tuple(a for a in everything if a in related | mixed and a not in positions)
    batch = tuple(a for a in everything if a not in {*heads, *queries})
    if not heads and len(batch) > 1:
        batch, heads = batch[:1], batch[1:]
    first = {a for a in _resolved([sources.pairs[0][0]], axes) if a in heads}
    shared = _resolved([sources.pairs[0][1]], axes)
    group = tuple(a for a in heads if a in first and a not in shared)
    resolved = axes.resolve(sources.features)
    return Places(batch, heads, queries, axes.resolve(keys), resolved, group, sources.widths)


def _readers(lifter: StageLifter) -> Atoms:
    """Axes from which a stage's own ones are computed: heads of which every second is read."""
    stages = lifter.stages
    reads = [r for s in stages.values() for r in lifter.stage_reads(s.body)]
    own = {
        n: {a for p, d in zip(s.private, s.dims, strict=True) if p for a in d}
        for n, s in stages.items()
    }
    places = [
        place
        for r in reads
        for atom, place in zip(stages[r.tensor].atoms, r.index, strict=True)
        if atom in own[r.tensor]
    ]
    return tuple(int(name[1:]) for place in places for name in ranks_of(place))


def _resolved(leaves: list[Leaf], axes: Axes) -> list[int]:
    return [a for leaf in leaves for d in leaf.dims for a in axes.resolve(d)]


def _mixed(lifter: StageLifter, root: Stage) -> tuple[Atoms, Atoms]:
    """(axes that linear maps sum over, axes that they make)."""
    folded: list[int] = []
    made: list[int] = []
    for stage in lifter.stages.values():
        if stage.kind != "product" or stage is root:
            continue
        if lifter.axes.resolve(stage.folded) == lifter.axes.resolve(lifter.region.keys):
            continue
        folded += stage.folded
        found = contraction(stage.node)
        assert found is not None
        product = found.product
        inside = lifter.stage_reads(stage.body)
        lifted = {a for r in inside for a in lifter.stages[r.tensor].atoms}
        made += [
            a
            for x, d in zip(product.out_labels, stage.dims, strict=True)
            if (x in product.left_labels) != (x in product.right_labels)
            for a in d
            if a not in lifted
        ]
    return tuple(folded), tuple(made)
