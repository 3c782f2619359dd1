"""The statements of the text notation: header lines, Einsums and iterative ranks, as a draft.

A draft is what the text says and nothing more; `infer.complete` makes a cascade of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from attn_rewrite.cascade.clauses import Clauses
from attn_rewrite.cascade.expr import Call, Const, Expr, Extent, Rank, Read, conjunction
from attn_rewrite.cascade.ir import Einsum, Loop, RankDecl, TensorDecl
from attn_rewrite.cascade.notation import Token
from attn_rewrite.cascade.unlabelled import split_loop


@dataclass
class Draft:
    """What a text declares; None where it has no such line.  ``extents`` are names of extents."""

    name: str = "cascade"
    ranks: list[RankDecl] = field(default_factory=list)
    inputs: list[TensorDecl] = field(default_factory=list)
    tensors: list[TensorDecl] | None = None
    outputs: list[str] | None = None
    body: list[Einsum | Loop] = field(default_factory=list)
    extents: dict[str, str] = field(default_factory=dict)


@dataclass
class _OpenLoop:
    """A loop being read: its place, its rank once a stop line names it, did ``body:`` start?"""

    start: Token
    at: int
    rank: str | None = None
    descending: bool = False
    labelled: bool = False
    init: list[Einsum] = field(default_factory=list)
    body: list[Einsum] = field(default_factory=list)


def read_program(text: str) -> Draft:
    """The draft of a whole text; `CascadeError` with line and column where it is not a cascade."""
    return _Program(text).read()


class _Program(Clauses):
    """Statements one after the other; `section` is where the next Einsum belongs."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines = text.split("\n")
        self.draft = Draft()
        self.open: _OpenLoop | None = None
        self.section: list[Einsum] | None = None  # None: the body of the cascade

    def read(self) -> Draft:
        if not self._more():
            raise self.error("a cascade: header lines and Einsums such as Y[m] = A[k, m] * B[k]")
        while self._more():
            handler = self._keyword()
            if handler is None:
                self._einsum()
            else:
                self.take()
                handler()
        if self.open is not None:
            if self.open.rank is None:
                raise self.error("'stop: rank >= #rank' for the init block", self.open.start)
            self._close_loop(self.open.rank, self.open.descending)
        return self.draft

    def _more(self) -> bool:
        while self.peek().kind == "newline" or self.is_op(";"):
            self.take()
        return self.peek().kind != "end"

    def _keyword(self) -> Callable[[], None] | None:
        """The handler of a keyword line; a keyword that is indexed or assigned to is a tensor."""
        token = self.peek()
        if token.kind != "name" or self.is_op("[", 1) or self.is_op("=", 1):
            return None
        handlers: dict[str, Callable[[], None]] = {
            "cascade": self._title, "rank": self._ranks, "ranks": self._ranks,
            "input": self._inputs, "inputs": self._inputs,
            "tensor": self._tensors, "tensors": self._tensors,
            "output": self._outputs, "outputs": self._outputs,
            "loop": self._loop, "init": self._init, "body": self._body, "out": self._out,
            "stop": self._stop, "end": self._end,
        }  # fmt: skip
        return handlers.get(token.text)

    # Header lines

    def _title(self) -> None:
        first = self.peek()
        if first.kind in ("newline", "end"):
            raise self.error("the name of the cascade")
        rest = self.lines[first.line - 1][first.column - 1 :].partition("--")[0].strip()
        self.draft.name = json.loads(first.text) if first.kind == "string" else rest
        while self.peek().kind not in ("newline", "end"):
            self.take()

    def _separated(self, item: Callable[[], None]) -> None:
        self.accept(":")
        while self.peek().kind in ("name", "string"):
            item()
            if not self.accept(","):
                break
            self.skip_newlines()
        self._end_of_statement()

    def _ranks(self) -> None:
        self._separated(self._rank)

    def _rank(self) -> None:
        name, size, parts = self.name("a rank name"), None, []
        if self.accept("="):
            size = self._integer(f"the extent of rank {name}")
        if self.accept("("):
            parts.append(self.name("the outer sub-rank"))
            while self.accept(","):
                parts.append(self.name("the inner sub-rank"))
            self.expect(")", f"the parts of rank {name}")
        self.draft.ranks.append(RankDecl(name, size, tuple(parts)))

    def _integer(self, what: str) -> int:
        token = self.peek()
        if token.kind != "number" or not token.text.isdigit():
            raise self.error(f"{what}, a whole number")
        return int(self.take().text)

    def _inputs(self) -> None:
        self._separated(lambda: self.draft.inputs.append(self._declaration()))

    def _tensors(self) -> None:
        found = self.draft.tensors = self.draft.tensors or []
        self._separated(lambda: found.append(self._declaration()))

    def _outputs(self) -> None:
        found = self.draft.outputs = self.draft.outputs or []
        self._separated(lambda: found.append(self.name("a tensor name")))

    def _declaration(self) -> TensorDecl:
        name, ranks = self.name("a tensor name"), []
        if self.accept("["):
            while not self.is_op("]"):
                ranks.append(self.name(f"a rank of {name}"))
                if not self.accept(","):
                    break
            self.expect("]", f"the ranks of {name}")
        default, words = 0.0, {"dtype": "float", "sign": "any", "scale": None}
        while self.is_word("default", *words):
            key = self.take().text
            self.accept("=")
            if key == "default":
                default = self._number(f"the default of {name}")
            else:
                words[key] = self.name(f"the {key} of {name}")
        dtype, sign = words["dtype"] or "float", words["sign"] or "any"
        return TensorDecl(name, tuple(ranks), default, dtype, sign, words["scale"])

    def _number(self, what: str) -> float:
        token = self.peek()
        value = self.expression()
        if not isinstance(value, Const):
            raise self.error(f"{what}, a number", token)
        return float(value.value)

    # Iterative ranks

    def _begin(self, start: Token, rank: str | None) -> _OpenLoop:
        if self.open is not None:
            raise self.error("'stop:' before the next loop starts (loops do not nest)", start)
        self.open = _OpenLoop(start, len(self.draft.body), rank)
        return self.open

    def _loop(self) -> None:
        start = self.peek()
        loop = self._begin(start, self.name("the iterative rank after 'loop'"))
        if self.is_word("descending"):
            self.take()
            loop.descending = True
        self.expect(":", "the iterative rank")
        self.section = loop.body

    def _init(self) -> None:
        start = self.peek()
        self.expect(":", "'init'")
        loop = self.open or self._begin(start, None)
        self.section = loop.init

    def _body(self) -> None:
        start = self.peek()
        self.expect(":", "'body'")
        loop = self.open or self._begin(start, None)
        loop.labelled = True
        self.section = loop.body

    def _out(self) -> None:
        self.expect(":", "'out'")
        self.section = None

    def _end(self) -> None:
        if self.open is None or self.open.rank is None:
            raise self.error("a loop before 'end'", self.tokens[self.at - 1])
        self._close_loop(self.open.rank, self.open.descending)

    def _stop(self) -> None:
        start = self.tokens[self.at - 1]
        self.accept(":")
        if self.is_word("when"):
            self.take()
        rank, descending = self._condition(self.expression())
        if self.open is None:
            self._unlabelled(rank, descending, start)
            return
        if self.open.rank not in (None, rank):
            raise self.error(f"the stop condition of rank {self.open.rank}", start)
        self._close_loop(rank, descending)

    def _unlabelled(self, rank: str, descending: bool, start: Token) -> None:
        """A loop without labels: the Einsums so far, told apart by the iterative rank."""
        plain = [s for s in self.draft.body if isinstance(s, Einsum)]
        parts = split_loop(plain, rank)
        if not parts.body or len(plain) < len(self.draft.body):
            raise self.error(f"an Einsum over {rank}, a loop or an init block before 'stop'", start)
        loop = Loop(rank, parts.init, parts.body, descending)
        self.draft.body = [*parts.before, loop, *parts.after]

    def _condition(self, condition: Expr) -> tuple[str, bool]:
        match condition:
            case Call("ge", (Rank(rank), Extent(other))) if other == rank:
                return rank, False
            case Call("ge", (Rank(rank), Rank(extent))):
                self.draft.extents[extent] = rank
                return rank, False
            case Call("lt", (Rank(rank), Const(0))):
                return rank, True
        raise self.error("'rank >= #rank', or 'rank < 0' for a descending rank, before this")

    def _close_loop(self, rank: str, descending: bool) -> None:
        loop = self.open
        assert loop is not None
        init, body = tuple(loop.init), tuple(loop.body)
        after: tuple[Einsum, ...] = ()
        if not body and not loop.labelled:
            parts = split_loop(init, rank)
            init, body, after = (*parts.before, *parts.init), parts.body, parts.after
        done = Loop(rank, init, body, descending)
        self.draft.body[loop.at : loop.at] = [done, *after]
        self.open = self.section = None

    # Einsums

    def _einsum(self) -> None:
        out = self._target()
        self.expect("=", f"the output {out.tensor}")
        self.skip_newlines()
        expr = self.expression()
        reduce: list[tuple[str, str]] = []
        guards: list[Expr] = []
        while tail := self.tail(expr):
            tail(reduce, guards)
        guard = conjunction((*guards, *self.filters))
        self.filters = []
        einsum = Einsum(out, expr, tuple(reduce), guard)
        (self.draft.body if self.section is None else self.section).append(einsum)
        if not self._assignment_follows():
            self._end_of_statement()

    def _target(self) -> Read:
        name = self.name("a tensor, a header line or a loop")
        return Read(name, self.index(name) if self.is_op("[") else ())

    def _assignment_follows(self) -> bool:
        """``RM[0] = -inf  RD[0] = 0``: does another Einsum start on the same line?"""
        at = self.at + self.is_op(",")
        tokens = self.tokens
        if tokens[at].kind not in ("name", "string"):
            return False
        end, depth = at + 1, 0
        while end < len(tokens) - 1 and (depth or tokens[end].text == "["):
            depth += {"[": 1, "]": -1}.get(tokens[end].text, 0)
            end += 1
        found = tokens[end].text == "="
        if found:
            self.at = at
        return found

    def _end_of_statement(self) -> None:
        if self.peek().kind not in ("newline", "end") and not self.is_op(";"):
            raise self.error(
                "an operator, '::', 'where' or the end of the line (a remark starts with --)"
            )
