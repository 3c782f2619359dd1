"""The operators ``attn_rewrite::triton_*``; importing this file registers them.

``triton_cascade(inputs, seed, cascade, schedule, dropout)`` runs the cascade that the text
``cascade`` writes down: ``inputs`` are its inputs in order (a dimension of extent 1 broadcasts, any
strides), ``schedule`` a schedule as text, or empty for the default.  It gives the outputs of the
cascade, and for a softmax attention the log-sum-exp [b, h, q] in float32 after them.  ``seed``
(int64 [1], None without dropout) and ``dropout`` make the factor of a cascade of `with_dropout`.

Operands are float16, bfloat16, float32 or 8-bit floats; sums and statistics are float32.  Output
with a head dimension has the type of the first floating input, bfloat16 where that has 8 bits.  A
row that keeps no key gives 0, and -inf as log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_rewrite.backends.triton.decode import decode, is_worth_splitting
from attn_rewrite.backends.triton.emit import Source
from attn_rewrite.backends.triton.gradient import plain_index
from attn_rewrite.backends.triton.launch import check_device, extents_of, result_dtype, run
from attn_rewrite.backends.triton.lists import blockwise_tables, make_lists
from attn_rewrite.backends.triton.packed import extents_by_rank
from attn_rewrite.backends.triton.prepare import (
    DROPOUT,
    backward,
    cascade_of,
    is_softmax,
    outputs_of,
    program_of,
    softmax_form,
    source_of,
    stages,
    with_lse,
)
from attn_rewrite.backends.triton.program import Program
from attn_rewrite.backends.triton.same import Same
from attn_rewrite.backends.triton.schedule import Schedule, from_text, to_text
from attn_rewrite.backends.triton.table_lists import lists_of_table, table_guard
from attn_rewrite.cascade.attention import SoftmaxAttention
from attn_rewrite.cascade.expr import Read, ranks_of
from attn_rewrite.cascade.text import parse_expr
from attn_rewrite.errors import LowerError

NAME = "attn_rewrite::triton_cascade"


def _named(text: str, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Inputs by name; a random factor is not among them."""
    declared = [t for t in cascade_of(text).inputs if t.name != DROPOUT]
    if len(declared) != len(inputs):
        names = ", ".join(t.name for t in declared)
        raise LowerError(f"triton_cascade got {len(inputs)} inputs, the cascade has {names}")
    for decl, tensor in zip(declared, inputs, strict=True):
        if tensor.ndim != len(decl.ranks):
            raise LowerError(
                f"triton_cascade: {decl.name} has shape {list(tensor.shape)}, expected one "
                f"dimension for each of [{', '.join(decl.ranks)}]"
            )
        if tensor.dtype == torch.float64:
            raise LowerError(f"Triton kernels compute in float32, and {decl.name} is float64")
    return {d.name: t for d, t in zip(declared, inputs, strict=True)}


@torch.library.custom_op("attn_rewrite::tile_lists", mutates_args=())
def tile_lists(
    like: Tensor,
    tables: Sequence[Tensor],
    guard: str,
    schedule: str,
    sizes: Sequence[int],
    rows: str,
) -> tuple[Tensor, Tensor]:
    """Lists of tiles of ``guard`` on the device of ``like``; ``sizes`` = [b, h, q, kv].

    ``tables`` are the values of `blockwise_tables`, sorted by name.  ``columns`` has room for every
    tile, so that its shape depends on no data.
    """
    chosen, size = _schedule(schedule), tuple(sizes)
    _room(guard, chosen, size, rows)
    if not tables:
        # Copies: a compiler may reuse the memory of what an operator gave it.
        tiles, columns = _static_lists(guard, chosen, size, rows, like.device)
        return tiles.clone(), columns.clone()
    known = table_guard(_expr(guard), chosen, rows) if len(tables) == 1 else None
    if known is not None:
        return lists_of_table(known, chosen, size, rows, tables[0])
    names = sorted(blockwise_tables(_expr(guard)))
    values = {n: t.cpu().numpy() for n, t in zip(names, tables, strict=True)}
    return _host_lists(guard, chosen, size, rows, like.device, values)


@lru_cache(maxsize=64)
def _static_lists(
    guard: str, schedule: Schedule, sizes: tuple[int, ...], rows: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    return _host_lists(guard, schedule, sizes, rows, device, {})


def _host_lists(
    guard: str,
    schedule: Schedule,
    sizes: tuple[int, ...],
    rows: str,
    device: torch.device,
    values: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Lists made on the host, copied to ``device``."""
    batch, heads, q_len, kv_len = sizes
    found = make_lists(
        _expr(guard), schedule, q_len=q_len, kv_len=kv_len, heads=heads, batch=batch, rows=rows,
        tables=values,
    )  # fmt: skip
    columns = torch.zeros(_room(guard, schedule, sizes, rows)[1], dtype=torch.int32)
    columns[: found.kept] = torch.from_numpy(found.columns)
    return torch.from_numpy(found.tiles).to(device), columns.to(device)


_expr = lru_cache(maxsize=256)(parse_expr)
_schedule = lru_cache(maxsize=256)(from_text)


def _room(guard: str, chosen: Schedule, sizes: Sequence[int], rows: str) -> tuple[list[int], int]:
    """The shape of ``tiles``, and how many tiles there are at most."""
    used = ranks_of(_expr(guard))
    batch, heads, q_len, kv_len = sizes
    length, across = (q_len, kv_len) if rows == "q" else (kv_len, q_len)
    side = chosen.block_rows // chosen.pack
    blocks = (length + side - 1) // side
    shape = [batch if "b" in used else 1, heads if "h" in used else 1, blocks, 3]
    tiles = (across + chosen.block_along - 1) // chosen.block_along
    room = shape[0] * shape[1] * blocks * tiles
    if isinstance(room, int) and room >= 1 << 31:
        raise LowerError(
            f"the lists of {guard} would number {room} tiles, and places in a list are less than "
            "2^31; use larger tiles, or fewer heads or batch entries at a time"
        )
    return shape, room


@tile_lists.register_fake
def _(
    like: Tensor,
    tables: Sequence[Tensor],
    guard: str,
    schedule: str,
    sizes: Sequence[int],
    rows: str,
) -> tuple[Tensor, Tensor]:
    shape, count = _room(guard, _schedule(schedule), sizes, rows)
    return like.new_empty(shape, dtype=torch.int32), like.new_empty([count], dtype=torch.int32)


def tables_of(source: Source, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The lists a source asks for."""
    if source.schedule.skipping != "lists":
        return {}
    guard, schedule, known = _list_texts(Same(source))
    sizes = extents_of(source, tensors)
    tiles, columns = tile_lists(
        next(iter(tensors.values())), [tensors[n] for n in known], guard, schedule,
        [sizes[r] for r in ("b", "h", "q", "kv")], source.program.roles.row,
    )  # fmt: skip
    return {"tiles": tiles, "columns": columns}


@lru_cache(maxsize=512)
def _list_texts(source: Same[Source]) -> tuple[str, str, tuple[str, ...]]:
    """The guard and the schedule as text, and the tables that decide for whole blocks."""
    (guard,) = source.value.program.guards()
    return str(guard), to_text(source.value.schedule), tuple(sorted(blockwise_tables(guard)))


def _execute(
    program: Program,
    tensors: Mapping[str, Tensor],
    schedule: str,
    dtypes: Mapping[str, torch.dtype],
    extra: Sequence[Tensor],
    name: str,
) -> dict[str, Tensor]:
    """Run one kernel on operands by name."""
    random = DROPOUT if any(t.name == DROPOUT for t in program.cascade.inputs) else None
    source = source_of(program, tensors, schedule, random=random, name=name)
    tables = tables_of(source, tensors)
    special = {}
    if random is not None:
        tables["seed"] = extra[0]
        special["dropout"] = float(extra[1])
    return run(source, tensors, dtypes, tables=tables, special=special, wrap=True)


@torch.library.triton_op(NAME, mutates_args=())
def triton_cascade(
    inputs: Sequence[Tensor], seed: Tensor | None, cascade: str, schedule: str, dropout: float
) -> list[Tensor]:
    """Run a cascade; see the module."""
    tensors = _named(cascade, inputs)
    check_device([*inputs, *([] if seed is None else [seed])])
    outputs = outputs_of(cascade)
    if _decodes(cascade, schedule, seed, tensors):
        merged = decode(cascade_of(cascade), tensors, wrap=True)
        return [merged[n] for n in outputs]
    known = dict(tensors)
    extra: Any = [] if seed is None else [seed, dropout]
    for stage in stages(cascade):
        chosen = schedule if stage is stages(cascade)[-1] else ""
        names = {t.name for t in stage.cascade.inputs}
        operands = {n: t for n, t in known.items() if n in names}
        known |= _execute(stage.program, operands, chosen, {}, extra, "attention")
    return [known[n] for n in outputs]


def _decodes(
    cascade: str, schedule: str, seed: Tensor | None, tensors: Mapping[str, Tensor]
) -> bool:
    """Few queries over a long cache, and nobody asked for a schedule or for dropout."""
    if schedule or seed is not None or not is_softmax(cascade):
        return False
    return is_worth_splitting(tensors)


@triton_cascade.register_fake  # type: ignore[untyped-decorator]
def _(
    inputs: Sequence[Tensor], seed: Tensor | None, cascade: str, schedule: str, dropout: float
) -> list[Tensor]:
    tensors = _named(cascade, inputs)
    whole, lanes = with_lse(cascade_of(cascade)), stages(cascade)[-1].program.roles.lanes
    sizes = extents_by_rank(cascade_of(cascade).inputs, tensors)
    found = []
    for name in outputs_of(cascade):
        einsum = whole.producer(name)
        assert einsum is not None
        ranks = [str(i) for i in einsum.out.index]
        wide = not set(lanes) & set(ranks)
        kind = torch.float32 if wide else result_dtype(inputs)
        found.append(inputs[0].new_empty([sizes[r] for r in ranks], dtype=kind))
    return found


# Gradients: an operator of its own, so that traced backward graphs hold one node.


def backward_programs(cascade: str, wanted: tuple[str, ...]) -> dict[str, Program]:
    """The programs of a backward pass: ``queries``, ``keys``, and ``reads`` where some are wanted.

    Raises `LowerError` where the attention has no gradient.
    """
    found = backward(cascade, wanted)
    programs = {
        "queries": program_of(found.queries, "q", "kv"),
        "keys": program_of(found.keys, "kv", "q"),
    }
    if found.reads is not None:
        programs["reads"] = program_of(found.reads, "q", "kv")
    return programs


def backward_operands(
    tensors: Mapping[str, Tensor], do: Tensor, out: Tensor, lse: Tensor, dlse: Tensor
) -> dict[str, Tensor]:
    """What the backward programs read, from the gradients ``do`` and ``dlse`` of the outputs."""
    # The gradient of the log-sum-exp adds P * dLSE to that of the scores.
    delta = (do.float() * out.float()).sum(-1) - dlse
    return {**tensors, "DO": do, "LSE": lse, "DELTA": delta}


@torch.library.triton_op(f"{NAME}_backward", mutates_args=())
def triton_cascade_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    cascade: str,
    dropout: float,
    wanted: Sequence[int],
) -> list[Tensor]:
    """Gradients of Q, K, V and of the inputs numbered by ``wanted``; ``grads`` of out and LSE."""
    tensors = _named(cascade, inputs)
    form = softmax_form(cascade)
    names = [form.reads[i - 3].name for i in wanted]
    sink = form.sink.tensor if isinstance(form.sink, Read) else ""
    programs = backward_programs(cascade, tuple(n for n in names if n != sink))
    do = grads[0]
    operands = backward_operands(tensors, do, out, lse, grads[1])
    delta = operands["DELTA"]
    extra: Any = [] if seed is None else [seed, dropout]
    f32 = torch.float32

    def gradient(part: str, dtypes: Mapping[str, torch.dtype]) -> Any:
        return _execute(programs[part], operands, "", dtypes, extra, f"backward_{part}")

    dq = gradient("queries", {"DQ": f32 if _broadcasts(do, inputs[0]) else do.dtype})
    keys = gradient("keys", {"DK": f32, "DV": f32})
    parts = [_summed(dq["DQ"], inputs[0]),
             *(_folded(keys[n], t) for n, t in (("DK", inputs[1]), ("DV", inputs[2])))]  # fmt: skip
    every = gradient("reads", {}) if "reads" in programs else {}
    for name, place in zip(names, wanted, strict=True):
        if name == sink:
            parts.append(_of_sink(form, inputs[place], lse, delta))
        else:
            parts.append(_reduced(every[f"D_{name}"], form, name, inputs[place]))
    return parts


def _of_sink(form: SoftmaxAttention, sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of a logit that joins the denominator: -DELTA times its probability."""
    assert isinstance(form.sink, Read)
    ranks = [str(i) for i in form.sink.index]
    shape = [sink.shape[ranks.index(r)] if r in ranks else 1 for r in ("b", "h", "q")]
    order = [ranks.index(r) for r in ("b", "h", "q") if r in ranks]
    wide = sink.float().permute(order).reshape(shape)
    pull = -(wide - lse.masked_fill(lse.isneginf(), 0.0)).exp() * delta  # no keys, no sink: 0
    return _reduced(pull, form, form.sink.tensor, sink)


def _folded(gradient: Tensor, like: Tensor) -> Tensor:
    """The sum over query heads that share a key head, in the type of the operand."""
    b, heads, length, lanes = gradient.shape
    shared = like.shape[1]
    return _summed(gradient.view(b, shared, heads // shared, length, lanes).sum(2), like)


def _broadcasts(gradient: Tensor, like: Tensor) -> bool:
    """Does a dimension of one of the operand meet a longer one?"""
    return any(a != b for a, b in zip(gradient.shape[:3], like.shape[:3], strict=True))


def _summed(gradient: Tensor, like: Tensor) -> Tensor:
    """The sum over dimensions along which the operand was broadcast, in its type."""
    ones = [i for i, (a, b) in enumerate(zip(gradient.shape, like.shape, strict=True)) if a != b]
    return (gradient.sum(ones, keepdim=True) if ones else gradient).to(like.dtype)


def _reduced(gradient: Tensor, form: SoftmaxAttention, name: str, like: Tensor) -> Tensor:
    """The gradient at all points [b, h, q, kv], summed over what the tensor does not have."""
    index = plain_index(form, name)
    every: list[str] = ["b", "h", "q", "kv"][: gradient.ndim]
    missing = [i for i, r in enumerate(every) if r not in index]
    total = gradient.sum(missing) if missing else gradient
    kept = [r for r in every if r in index]
    return _summed(total.permute([kept.index(r) for r in index]).contiguous(), like)


@triton_cascade_backward.register_fake  # type: ignore[untyped-decorator]
def _(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    cascade: str,
    dropout: float,
    wanted: Sequence[int],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (*inputs[:3], *(inputs[i] for i in wanted))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, seed, cascade, _, dropout = inputs
    ctx.count, ctx.seeded = len(tensors), seed is not None
    # Gradients of the inputs beside Q, K and V are made only where someone asks for them.
    ctx.wanted = [i for i, t in enumerate(tensors) if i >= 3 and t.requires_grad]
    ctx.cascade, ctx.dropout = cascade, dropout
    ctx.save_for_backward(*tensors, *output[:2], *([seed] if seed is not None else []))


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, (out, lse) = saved[: ctx.count], saved[ctx.count : ctx.count + 2]
    seed = saved[-1] if ctx.seeded else None
    found = torch.ops.attn_rewrite.triton_cascade_backward(
        grads, tensors, out, lse, seed, ctx.cascade, ctx.dropout, ctx.wanted
    )
    by_input: list[Tensor | None] = [*found[:3], *([None] * (ctx.count - 3))]
    for i, part in zip(ctx.wanted, found[3:], strict=True):
        by_input[i] = part
    return by_input, None, None, None, None


triton_cascade.register_autograd(_differentiate, setup_context=_save)
