"""Tokens and expressions of the text notation: from characters to `Expr` trees.

The notation is that of `Expr.__str__` plus what people type by hand and what papers print: ``x``
and ``.`` as product signs, ``^`` for powers, ``|m - p|``, ``and or not``, chained comparisons
(``0 <= q - kv < 4``), ``max`` of several arguments and filters inside an index
(``A[k : k <= i]``).  A comment runs from ``--``, or from ``#`` and a blank, to the end of the line;
a line that starts with ``//`` is one too.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass

from attn_rewrite.cascade.expr import OPERATORS, Call, Const, Expr, Extent, Rank, Read, call
from attn_rewrite.errors import CascadeError

_TOKEN = re.compile(
    r"""(?P<space>^[ \t]*//[^\n]*|[ \t\r]+|--[^\n]*|\#(?=[ \t\r\n]|\Z)[^\n]*)
      | (?P<newline>\n)
      | (?P<number>(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?)
      | (?P<name>[^\W\d][\w@]*(?:\.\w+)*'*)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<op>::|//|\*\*|<=|>=|==|!=|[-+*/%<>=&|~()\[\],:;#.^])""",
    re.VERBOSE | re.MULTILINE,
)
# What papers print, and what is typed for it (written as escapes: they look like ASCII).
_SIGNS = str.maketrans({
    "\N{MULTIPLICATION SIGN}": "*", "\N{MIDDLE DOT}": "*", "\N{MINUS SIGN}": "-",
    "\N{DOT OPERATOR}": "*", "\N{DIVISION SIGN}": "/",
    "\N{INFINITY}": "inf", "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{GREATER-THAN OR EQUAL TO}": ">=", "\N{NOT EQUAL TO}": "!=",
    "\N{N-ARY LOGICAL OR}": "reduce", "\N{N-ARY LOGICAL AND}": "map",
    "\N{LOGICAL OR}": "|", "\N{LOGICAL AND}": "&",
    "\N{UNION}": "union", "\N{INTERSECTION}": "intersect",
    "\N{WHITE DIAMOND}": "stop ", "\N{DIAMOND OPERATOR}": "stop ",
})  # fmt: skip
_SPELLINGS = {"ln": "log", "sigma": "sigmoid", "\N{GREEK SMALL LETTER SIGMA}": "sigmoid"}

# Binding of the word operators, looser than every symbol of `OPERATORS`.
_OR_WORD, _AND_WORD, _NOT_WORD, _COMPARE, _UNARY = -3, -2, -1, 1, 6
_INFIX = {o.infix: o for o in OPERATORS.values() if o.infix}
_INFIX |= {".": OPERATORS["mul"], "^": OPERATORS["pow"]}


@dataclass(frozen=True)
class Token:
    """A word of the text: ``kind`` is number, name, string, op, newline or end."""

    kind: str
    text: str
    line: int
    column: int

    def __str__(self) -> str:
        if self.kind in ("newline", "end"):
            return "the end of the line" if self.kind == "newline" else "the end of the text"
        return repr(self.text)


def tokenize(text: str) -> list[Token]:
    """Tokens of ``text``, the end token included; `CascadeError` at a character that fits nowhere.

    A line does not end inside brackets.
    """
    text = text.replace("\N{LOGICAL OR}_", "reduce_").replace("\N{LOGICAL AND}_", "map_")
    text = text.translate(_SIGNS)
    tokens: list[Token] = []
    line, start, position, depth = 1, 0, 0, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        column = position - start + 1
        if match is None:
            raise CascadeError(
                f"line {line}, column {column}: expected a name, number or operator, found "
                f"{text[position]!r}"
            )
        kind = str(match.lastgroup)
        depth = max(0, depth + {"(": 1, "[": 1, ")": -1, "]": -1}.get(match.group(), 0))
        if kind != "space" and not (kind == "newline" and depth):
            tokens.append(Token(kind, match.group(), line, column))
        position = match.end()
        if kind == "newline":
            line, start = line + 1, position
    tokens.append(Token("end", "", line, position - start + 1))
    return tokens


class Reader:
    """A cursor over tokens, and the expression grammar on it (precedence climbing)."""

    def __init__(self, text: str) -> None:
        self.tokens = tokenize(text)
        self.at = 0
        self.filters: list[Expr] = []  # conditions written inside indices: A[k : k <= i]

    def peek(self, ahead: int = 0) -> Token:
        """The token ``ahead`` of the cursor, not consumed."""
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)]

    def take(self) -> Token:
        """The next token, consumed."""
        token = self.peek()
        self.at += token.kind != "end"
        return token

    def is_op(self, text: str, ahead: int = 0) -> bool:
        """Is the coming token the operator or bracket ``text``?"""
        token = self.peek(ahead)
        return token.kind == "op" and token.text == text

    def is_word(self, *words: str) -> bool:
        """Is the coming token one of these bare words?"""
        token = self.peek()
        return token.kind == "name" and token.text in words

    def accept(self, text: str) -> bool:
        """Consume the operator ``text`` if it comes next."""
        if self.is_op(text):
            self.take()
            return True
        return False

    def expect(self, text: str, after: str) -> None:
        """Consume ``text`` or fail."""
        if not self.accept(text):
            raise self.error(f"{text!r} after {after}")

    def name(self, what: str) -> str:
        """Consume a bare or quoted name."""
        token = self.peek()
        if token.kind not in ("name", "string"):
            raise self.error(what)
        self.take()
        return str(json.loads(token.text)) if token.kind == "string" else token.text

    def error(self, expected: str, token: Token | None = None) -> CascadeError:
        """The error that says what was expected at the cursor and what stands there."""
        found = token or self.peek()
        return CascadeError(
            f"line {found.line}, column {found.column}: expected {expected}, found {found}"
        )

    def skip_newlines(self) -> None:
        """Move past line ends (after an operator the expression goes on in the next line)."""
        while self.tokens[self.at].kind == "newline":
            self.at += 1

    def expression(self, binding: int = _OR_WORD) -> Expr:
        """An expression whose operators bind at least as tight as ``binding``."""
        left = self._prefix(binding)
        while True:
            found = self._infix()
            if found is None or found[1] < binding:
                return left
            op, level = found
            self.take()
            self.skip_newlines()
            if level == _COMPARE:
                left = self._comparison(op, left)
            else:
                right = self.expression(level if op == "pow" else level + 1)
                left = call(op, left, right)

    def _infix(self) -> tuple[str, int] | None:
        token = self.peek()
        if token.kind == "name":
            words = {"x": ("mul", 5), "and": ("and", _AND_WORD), "or": ("or", _OR_WORD)}
            return words.get(token.text)
        operator = _INFIX.get(token.text) if token.kind == "op" else None
        return (operator.name, operator.binding) if operator else None

    def _comparison(self, op: str, left: Expr) -> Expr:
        right = self.expression(_COMPARE + 1)
        result = call(op, left, right)
        while (found := self._infix()) is not None and found[1] == _COMPARE:
            self.take()
            self.skip_newlines()
            left, right = right, self.expression(_COMPARE + 1)
            result = call("and", result, call(found[0], left, right))
        return result

    def _prefix(self, binding: int) -> Expr:
        if self.is_word("not") and not self.is_op("(", 1):
            self.take()
            return call("not", self.expression(max(binding, _NOT_WORD)))
        if self.accept("~"):
            return call("not", self.expression(_UNARY))
        if self.accept("+"):
            return self.expression(_UNARY)
        if self.accept("-"):
            operand = self.expression(_UNARY)
            negative = isinstance(operand, Const) and not isinstance(operand.value, bool)
            if isinstance(operand, Const) and negative:
                return Const(-operand.value)
            return call("neg", operand)
        return self._primary()

    def _primary(self) -> Expr:
        token = self.peek()
        if token.kind == "number":
            self.take()
            integer = token.text.isdigit()
            return Const(int(token.text) if integer else float(token.text))
        if self.accept("("):
            inner = self.expression()
            self._close(")", "the expression in parentheses")
            return inner
        if self.accept("|"):
            inner = self.expression(OPERATORS["or"].binding + 1)
            self._close("|", "the absolute value")
            return call("abs", inner)
        if self.accept("#"):
            return Extent(self.name("a rank name after '#'"))
        if token.kind in ("name", "string"):
            return self._named(token)
        raise self.error("an expression (a tensor, rank, number, '(' or function)")

    def _close(self, bracket: str, what: str) -> None:
        if not self.accept(bracket):
            raise self.error(f"{bracket!r} or an operator after {what}")

    def _named(self, token: Token) -> Expr:
        literal = {"inf": math.inf, "nan": math.nan, "true": True, "false": False}
        bare = token.kind == "name"
        if bare and token.text in literal and not self.is_op("[", 1):
            self.take()
            return Const(literal[token.text])
        name = self.name("a name")
        if self.is_op("["):
            return Read(name, self.index(name))
        if bare and self.is_op("("):
            return self._call(token)
        return Rank(name)

    def index(self, tensor: str) -> tuple[Expr, ...]:
        """The bracketed index after the name of ``tensor``; filters go to `filters`."""
        self.expect("[", f"tensor {tensor}")
        return self._arguments("]", f"the index of {tensor}", filtered=True)

    def _arguments(self, bracket: str, what: str, filtered: bool = False) -> tuple[Expr, ...]:
        found: list[Expr] = []
        while not self.is_op(bracket):
            found.append(self.expression())
            if filtered and self.accept(":"):
                self.filters.append(self.expression())
            if not self.accept(","):
                break
        self._close(bracket, what)
        return tuple(found)

    def _call(self, token: Token) -> Expr:
        name = _SPELLINGS.get(token.text, token.text)
        operator = OPERATORS.get(name)
        if operator is None:
            raise CascadeError(
                f"line {token.line}, column {token.column}: unknown function {token.text!r}; "
                f"{_function_hint(name)}"
            )
        self.expect("(", name)
        args = self._arguments(")", f"the arguments of {name}")
        if name in ("max", "min", "add", "mul", "and", "or") and len(args) > 2:
            return self._fold(name, args)
        if len(args) != operator.arity:
            raise CascadeError(
                f"line {token.line}, column {token.column}: {name} takes {operator.arity} "
                f"argument(s), found {len(args)}"
            )
        return Call(name, args)

    @staticmethod
    def _fold(name: str, args: tuple[Expr, ...]) -> Expr:
        result = args[0]
        for arg in args[1:]:
            result = call(name, result, arg)
        return result


_FOLDING = re.compile(r"(max|min|sum|add|prod|mul)(?:_|$)(\w*)")


def _function_hint(name: str) -> str:
    """What to write instead of a function that there is not."""
    folding = _FOLDING.match(name)
    if folding is not None:
        op, rank = folding[1], folding[2] or "m"
        return f"a reduction stands behind the expression: ':: reduce_{rank} {op}'"
    if name.startswith("softmax"):
        return "write it as the Einsums of its max, exp, sum and division"
    near = difflib.get_close_matches(name, OPERATORS, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(OPERATORS))}"
