"""Choosing orders and lists of blocks for `paro` on sample inputs.

The model runs call by call; at each Site the blocks of every head's attention map are summed up in
every candidate order (`backends.torch.statistics`: no map is ever held), and what was summed is
added to what earlier calls gave.  With a state folder nothing is kept in memory between Sites, and
a run that was interrupted goes on with the first Site and call that is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attn_rewrite import block_choice as choice
from attn_rewrite.backends.torch.statistics import HeadMap, block_statistics, row_lse
from attn_rewrite.cascade.ir import Cascade
from attn_rewrite.cascade.reordered import as_reordered
from attn_rewrite.cascade.staged import as_staged
from attn_rewrite.errors import PolicyError, ToolError
from attn_rewrite.passes.keep import Exact
from attn_rewrite.passes.reorder.reorder import Reorder
from attn_rewrite.passes.sparse.blocks import Blocks
from attn_rewrite.passes.sparse.paro import Paro
from attn_rewrite.passes.transform import Transform
from attn_rewrite.plan import Plan, Step, expected_tiles, rewritten
from attn_rewrite.site import Refusal, Site
from attn_rewrite.tables import Table
from attn_rewrite.token_layout import TokenLayout

if TYPE_CHECKING:
    from attn_rewrite.calibration import Call, Progress
    from attn_rewrite.cascade.attention import SoftmaxAttention
    from attn_rewrite.policy import Policy
    from attn_rewrite.site import Findings

Arrays = dict[str, npt.NDArray[Any]]

# Elements of a tensor that tell whether a state folder belongs to this run.
_SAMPLES = 4096


@dataclass(frozen=True)
class Measured(Paro):
    """Stands for `paro` while a plan is made: admitted like it, and nothing is rewritten yet."""

    def apply(self, cascade: Cascade, site: Site) -> Cascade | Refusal:
        """The cascade as it is, or why no blocks can be chosen."""
        if as_reordered(cascade) is not None:
            reason = "paro chooses the order itself; leave out the reorder before it"
            return self.refuse(site, "paro-reordered", reason)
        staged = as_staged(cascade)
        if staged is None or staged.stages or staged.probability is not None:
            reason = "paro measures a softmax attention that is not quantised; write paro first"
            return self.refuse(site, "paro-late", reason)
        if isinstance(grid := self.grid(site), Refusal):
            return grid
        return cascade


def tentative(policy: Policy) -> Policy:
    """``policy`` with `Measured` in the place of `paro`."""
    from attn_rewrite.policy import Policy as Rules

    def standing_for(t: Transform) -> Transform:
        if not isinstance(t, Paro):
            return t
        return Measured(**{f.name: getattr(t, f.name) for f in fields(t)})

    rules = [replace(r, apply=tuple(map(standing_for, r.apply))) for r in policy.rules]
    return Rules(rules, policy.budget)


def names_paro(policy: Policy) -> bool:
    """Does a rule name `paro`?"""
    return any(isinstance(t, Paro) for rule in policy.rules for t in rule.apply)


def calibrated_blocks(
    host: fx.GraphModule,
    findings: Findings,
    plan: Plan,
    calls: Sequence[Call],
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """``plan`` with every `Measured` replaced by ``reorder(...) | blocks(...)``, and their tables.

    ``state`` is a folder for what was measured; ``progress`` is told (done, all, what) after every
    Site of every call.  Raises `PolicyError` for calls that do not fit, or a folder of another run.
    """
    from attn_rewrite.calibration import observe

    sites = {s.name: s for s in findings.sites}
    steps = [s for s in plan.steps if any(isinstance(t, Measured) for t in s.transforms)]
    if not steps:
        return plan
    told = _Told(progress, len(calls) * len(steps))
    run = fingerprint(host, steps, calls)
    trials = [
        _Trial(sites[s.site], s, _Store(state, number, run), told, _numbered(steps, number))
        for number, s in enumerate(steps)
    ]
    for number, (args, kwargs) in enumerate(calls):
        left = [t for t in trials if not t.seen(number)]
        told.skip(len(trials) - len(left))
        for trial in left:
            trial.call = number
        if left:
            observe(host, left, args, kwargs, held_out=False)
    chosen = {trial.step: trial.choose(len(calls)) for trial in trials}
    tables = {**plan.tables, **dict(c.table for c in chosen.values())}
    new = tuple(chosen[s].step if s in chosen else s for s in plan.steps)
    return replace(plan, steps=new, tables=tables)


def _numbered(steps: Sequence[Step], number: int) -> str:
    """The name of a table: ``paro``, or ``paro1`` for the second group of heads of a Site."""
    before = sum(s.site == steps[number].site for s in steps[:number])
    return f"paro{before}" if before else "paro"


def fingerprint(host: fx.GraphModule, steps: Sequence[Step], calls: Sequence[Call]) -> str:
    """What a state folder belongs to: the steps, and samples of the calls and the weights."""
    found = hashlib.sha256()
    found.update(json.dumps([[s.site, s.text, s.heads] for s in steps]).encode())
    for tensor in (*pytree.tree_leaves(list(calls)), *host.state_dict().values()):
        if isinstance(tensor, Tensor):
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(flat.numel() // _SAMPLES, 1)].double().cpu()
            found.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            found.update(some.numpy().tobytes())
    return found.hexdigest()


@dataclass(eq=False)
class _Told:
    """Counts what is done and tells who wants to know."""

    progress: Progress | None
    total: int
    done: int = 0

    def skip(self, count: int) -> None:
        """Count what an earlier run did."""
        if count:
            self.step("measured before", count)

    def step(self, what: str, count: int = 1) -> None:
        """One Site of one call, or several."""
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total, what)


@dataclass(eq=False)
class _Store:
    """Sums of one trial: in memory, or in a file that is written whole or not at all."""

    folder: Path | None
    number: int
    run: str
    held: Arrays = field(default_factory=dict)
    calls: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PolicyError(f"the state folder {self.folder} cannot be made: {error}") from None
        if self.path.exists():
            self.calls = tuple(self._header()["calls"])

    @property
    def path(self) -> Path:
        """The file of this trial."""
        assert self.folder is not None
        return self.folder / f"site-{self.number:04}.safetensors"

    def _header(self) -> dict[str, Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "numpy") as file:
                found = dict(file.metadata() or {})
            calls = [int(number) for number in json.loads(found["calls"])]
            header = {"run": found["run"], "calls": calls}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise PolicyError(f"{self.path} cannot be read: {error}; remove the folder") from None
        if header["run"] != self.run:
            raise PolicyError(
                f"{self.path} was measured with another policy, model or inputs; "
                "name another state folder, or remove this one"
            )
        return header

    def read(self) -> Arrays:
        """What was summed so far; empty at first."""
        if self.folder is None or not self.calls:
            return self.held
        from safetensors.numpy import load_file

        found: Arrays = load_file(self.path)
        return found

    def write(self, arrays: Arrays, call: int) -> None:
        """Keep what was summed, ``call`` included."""
        self.calls = (*self.calls, call)
        if self.folder is None:
            self.held = arrays
            return
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        part = self.path.with_suffix(".partial")
        metadata = {"run": self.run, "calls": json.dumps(self.calls)}
        try:
            save_file(arrays, part, metadata=metadata)
            os.replace(part, self.path)
        except (OSError, SafetensorError) as error:
            reason = f"{self.path} cannot be written: {error}"
            raise ToolError(reason, stage="calibration") from None


@dataclass(frozen=True)
class _Chosen:
    """The step that a trial ends in, and its table by name."""

    step: Step
    table: tuple[str, Table]


@dataclass(eq=False)
class _Trial:
    """One step on one Site: measures its heads in every candidate order."""

    site: Site
    step: Step
    store: _Store
    told: _Told
    table: str
    call: int = 0

    def __post_init__(self) -> None:
        at = next(i for i, t in enumerate(self.step.transforms) if isinstance(t, Measured))
        self.before, self.after = self.step.transforms[:at], self.step.transforms[at + 1 :]
        paro = self.step.transforms[at]
        assert isinstance(paro, Measured)
        layout = paro.grid(self.site)
        assert isinstance(layout, TokenLayout)
        self.paro, self.layout = paro, layout
        self.orders = paro.candidates(layout)
        self.heads = tuple(range(self.site.hq)) if self.step.heads is None else self.step.heads
        self.form = self._form()

    def _form(self) -> SoftmaxAttention:
        """The attention that is measured: what stands before `paro` in the pipeline."""
        step = replace(self.step, transforms=self.before or (Exact(),), heads=None)
        cascade = rewritten(self.site, step)
        assert isinstance(cascade, Cascade)
        staged = as_staged(cascade)
        assert staged is not None
        return staged.form

    def seen(self, call: int) -> bool:
        """Whether a call was measured before."""
        return call in self.store.calls

    # Measuring

    def see(self, inputs: Mapping[str, Tensor], held_out: bool) -> None:
        """Add one call to the sums."""
        found = self._measured(inputs)
        have = self.store.read()
        self.store.write({n: have[n] + t if n in have else t for n, t in found.items()}, self.call)
        self.told.step(self.site.name)

    def _measured(self, inputs: Mapping[str, Tensor]) -> Arrays:
        """``sums`` [orders, heads, blocks of queries, blocks of keys] float32; ``sparse`` and
        ``quant`` [orders, heads], summed over the batch; ``maps`` counts its entries."""
        block, device = self.paro.block, inputs["Q"].device
        batch, q_len, kv_len = len(inputs["Q"]), inputs["Q"].shape[2], inputs["K"].shape[2]
        shape = (len(self.orders), len(self.heads))
        blocks = (-(-q_len // block), -(-kv_len // block))
        sums = np.zeros((*shape, *blocks), np.float32)
        sparse, quant = np.zeros(shape), np.zeros(shape)
        places = [
            tuple(torch.from_numpy(o.indices(n)).to(device) for n in (q_len, kv_len))
            for o in self.orders.values()
        ]
        for entry in range(batch):
            for at, head in enumerate(self.heads):
                source = HeadMap(self.form, inputs, entry, head)
                lse = row_lse(source)
                for number, (rows, columns) in enumerate(places):
                    found = block_statistics(source, lse, rows, columns, block, self.paro.epsilon)
                    parts = (found.sums, found.tops, found.small, found.areas)
                    total, tops, small, areas = (t.numpy() for t in parts)
                    sums[number, at] += total.astype(np.float32)
                    sparse[number, at] += choice.sparse_share(small, areas, self.paro.sigma)
                    quant[number, at] += choice.incoherence(total, tops, areas)
        return {"sums": sums, "sparse": sparse, "quant": quant, "maps": np.array([batch])}

    # Choosing

    def choose(self, calls: int) -> _Chosen:
        """The order of each key head and the blocks of each head."""
        found = self.store.read()
        forced = self._forced(found["sums"].shape[2:])
        group = self.site.hq // self.site.hkv
        names = list(self.orders)
        picked: dict[int, int] = {}
        for key_head in sorted({h // group for h in self.heads}):
            members = [i for i, h in enumerate(self.heads) if h // group == key_head]
            picked[key_head] = self._order(found, members, forced)
        table = np.ones((self.site.hq, *forced.shape), np.bool_)
        kept = []
        for at, head in enumerate(self.heads):
            sums = found["sums"][picked[head // group], at].astype(np.float64)
            table[head] = choice.choose_blocks(sums, forced, self.paro.target)
            kept.append(choice.recall_of(sums, table[head]))
        orders = [names[picked.get(h, 0)] for h in range(self.site.hkv)]
        return self._chosen(orders, table, kept, calls, [names[i] for i in picked.values()])

    def _forced(self, shape: Sequence[int]) -> choice.Bools:
        """Blocks that hold text: dense."""
        first, last = self.layout.text, self.layout.text + self.layout.tokens
        assert isinstance(self.site.q_len, int)
        assert isinstance(self.site.kv_len, int)
        rows = choice.text_blocks(self.site.q_len, self.paro.block, first, last)
        columns = choice.text_blocks(self.site.kv_len, self.paro.block, first, last)
        return np.broadcast_to(rows[:, None] | columns[None], tuple(shape)).copy()

    def _order(self, found: Arrays, members: Sequence[int], forced: choice.Bools) -> int:
        """The candidate that serves the heads of one key head best."""
        orders = range(len(self.orders))
        maps = int(found["maps"][0]) * len(members)
        sparse = [float(found["sparse"][o, members].sum()) / maps for o in orders]
        quant = [float(found["quant"][o, members].sum()) / maps for o in orders]
        literal = self.paro.metric == "literal"
        scores = choice.block_scores(sparse, quant, self.paro.alpha, literal=literal)
        if self.paro.metric != "recall":
            return choice.best(scores, [0.0] * len(scores))
        sums = found["sums"].astype(np.float64)
        losses = [
            sum(choice.target_score(sums[o, m], forced, self.paro.target) for m in members)
            for o in orders
        ]
        return choice.best(losses, scores)

    def _chosen(
        self,
        orders: Sequence[str],
        table: Table,
        kept: Sequence[float],
        calls: int,
        measured: Sequence[str],
    ) -> _Chosen:
        moved = [o for o in orders if not self.orders[o].is_identity]
        order = orders[0] if len(set(orders)) == 1 else tuple(orders)
        reorder = (Reorder(order, layout=str(self.layout)),) if moved else ()
        blocks = Blocks(self.table, self.paro.block, self.paro.semantics)
        transforms = (*self.before, *reorder, blocks, *self.after)
        counts = ", ".join(f"{n} x {name}" for name, n in Counter(measured).most_common())
        note = (
            f"calibrated over {calls} call{'s' * (calls > 1)}: orders {counts}; attention kept "
            f"{min(kept):.4f} to {max(kept):.4f}"
        )
        step = replace(self.step, transforms=transforms, note=note)
        result = rewritten(self.site, step)
        if isinstance(result, Cascade):
            tiles = expected_tiles(self.site, result, tables={self.table: table})
            step = replace(step, tiles=tiles)
        return _Chosen(step, (f"{self.site.name}/{self.table}", table))
