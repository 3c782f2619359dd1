"""Cascades as text that reads like the paper's notation, and back: ``parse(str(c)) == c``.

::

    cascade attention-3pass
    ranks p, m, e, f
    inputs Q[e, p], K[e, m], V[f, m]
    tensor GM[p] default -inf
    output AV

    QK[m, p] = Q[e, p] * K[e, m]
    GM[p] = QK[m, p] :: reduce_m max
    SN[m, p] = exp(QK[m, p] - GM[p]) where m <= p

Every header line may be left out: tensors that are never written are inputs, tensors that are
never read are outputs, and where no ``tensor`` line says otherwise the default of a tensor made by
a max is ``-inf``.  ``where`` filters the iteration space, an omitted reduction is a sum, ``#m`` is
the extent of rank ``m`` and ``--`` starts a comment.  An iterative rank is written as::

    loop m1:                       -- or only init: and body:, the rank is that of the stop line
      init:
        RM[0, p] = -inf
      body:
        RM[m1 + 1, p] = max(RM[m1, p], LM[m1, p])
      stop: m1 >= #m1              -- or `loop m1 descending:` and `stop: m1 < 0`

or without labels, as the paper does: ``S[0] = 0 ; S[i+1] = S[i] + A[i] ; stop when i >= K``.  The
full form of an action is read too: ``:: map_k x(intersect) reduce_k +(union)``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from attn_rewrite.cascade.expr import TRUE, Const, Expr, quoted, to_text
from attn_rewrite.cascade.infer import complete, inferred_tensors, too_deep
from attn_rewrite.cascade.ir import Cascade, Einsum, Loop, RankDecl, Statement, TensorDecl
from attn_rewrite.cascade.notation import Reader
from attn_rewrite.cascade.statements import read_program

_BARE_TITLE = re.compile(r"[\w.+/=]+(?:-[\w.+/=]+)*", re.ASCII)
_LINE = 100


def parse(text: str) -> Cascade:
    """The cascade that ``text`` writes down; what it leaves undeclared is inferred.

    Raises `CascadeError` with line, column and what was expected.
    """
    try:
        return complete(read_program(text))
    except RecursionError as error:
        raise too_deep() from error


def parse_expr(text: str) -> Expr:
    """The expression that ``text`` writes down; bare names are ranks (a scalar tensor is ``c[]``).

    Raises `CascadeError` with line, column and what was expected.
    """
    reader = Reader(text)
    reader.skip_newlines()
    expr = reader.expression()
    reader.skip_newlines()
    if reader.peek().kind != "end" or reader.filters:
        raise reader.error("an operator or the end of the expression")
    return expr


def cascade_to_text(cascade: Cascade) -> str:
    """The text of ``cascade``, header first; `parse` reads an equal cascade back."""
    lines = [f"cascade {_title(cascade.name)}", *_header(cascade), ""]
    for statement in cascade.body:
        lines += _statement(statement)
    return "\n".join(lines) + "\n"


def einsum_to_text(einsum: Einsum) -> str:
    """One Einsum on one line: ``out = expr :: reduce_r op where guard``."""
    text = f"{to_text(einsum.out)} = {to_text(einsum.expr)}"
    if einsum.reduce:
        text += " :: " + ", ".join(f"{quoted(f'reduce_{r}')} {op}" for r, op in einsum.reduce)
    if einsum.guard != TRUE:
        text += f" where {to_text(einsum.guard)}"
    return text


def loop_to_text(loop: Loop) -> str:
    """An iterative rank with its init and body Einsums and its stop condition."""
    return "\n".join(_loop(loop))


def _statement(statement: Statement) -> Iterator[str]:
    if isinstance(statement, Loop):
        yield from _loop(statement)
    else:
        yield einsum_to_text(statement)


def _loop(loop: Loop) -> Iterator[str]:
    rank = quoted(loop.rank)
    yield f"loop {rank}{' descending' if loop.descending else ''}:"
    yield "  init:"
    yield from (f"    {einsum_to_text(e)}" for e in loop.init)
    yield "  body:"
    yield from (f"    {einsum_to_text(e)}" for e in loop.body)
    yield f"  stop: {rank} < 0" if loop.descending else f"  stop: {rank} >= #{rank}"


def _title(name: str) -> str:
    return name if _BARE_TITLE.fullmatch(name) else json.dumps(name)


def _header(cascade: Cascade) -> Iterator[str]:
    if cascade.ranks:
        yield "ranks " + ", ".join(map(_rank, cascade.ranks))
    inputs = [_declaration(t) for t in cascade.inputs]
    joined = "inputs " + ", ".join(inputs)
    if len(joined) <= _LINE and all(text.endswith("]") for text in inputs):
        yield from [joined] if inputs else []
    else:
        yield from (f"input {text}" for text in inputs)
    yield from (f"tensor {_declaration(t)}" for t in cascade.tensors)
    if not cascade.tensors and inferred_tensors(cascade.body):
        yield "tensors"  # says that nothing is left to infer
    yield " ".join(["output", ", ".join(map(quoted, cascade.outputs))]).rstrip()


def _rank(rank: RankDecl) -> str:
    text = quoted(rank.name)
    if rank.size is not None:
        text += f" = {rank.size}"
    if rank.parts:
        text += f" ({', '.join(map(quoted, rank.parts))})"
    return text


def _declaration(tensor: TensorDecl) -> str:
    text = f"{quoted(tensor.name)}[{', '.join(map(quoted, tensor.ranks))}]"
    if tensor.default != 0:
        text += f" default {to_text(Const(float(tensor.default)))}"
    if tensor.dtype != "float":
        text += f" dtype {quoted(tensor.dtype)}"
    if tensor.sign != "any":
        text += f" sign {quoted(tensor.sign)}"
    if tensor.scale is not None:
        text += f" scale {quoted(tensor.scale)}"
    return text
