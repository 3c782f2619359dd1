"""Token layout: what the positions of an attention mean.

A sequence is, in this order, a text prefix, a grid of one to three axes flattened row by row
(frames x rows x columns), extra keys that no query stands for (pooled keys), a text suffix, and
padding.  As text: ``grid=30x48x80``, ``frames=18,tokens=3840``, ``length=4096``, each with
``text=N`` (prefix), ``suffix=N``, ``extra=N`` and ``padding=N``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from attn_rewrite.cascade.expr import FALSE, Expr
from attn_rewrite.errors import PolicyError

EXPECTED = "write grid=30x48x80, frames=18,tokens=3840 or length=4096, with text=N where needed"
_COUNTS = ("text", "extra", "suffix", "padding")
_SHAPES = ({"grid"}, {"frames", "tokens"}, {"length"})


@dataclass(frozen=True)
class TokenLayout:
    """Segments of a sequence; ``grid`` has one to three extents, the last one runs fastest.

    ``text``, ``suffix`` and ``padding`` are tokens before and after the grid; ``extra`` are keys
    between grid and suffix that have no query.  Extents are positive, counts not negative
    (`PolicyError`).
    """

    grid: tuple[int, ...]
    text: int = 0
    extra: int = 0
    suffix: int = 0
    padding: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.grid) <= 3 or min(self.grid) < 1:
            shown = "x".join(map(str, self.grid)) or "nothing"
            raise PolicyError(f"a token layout has a grid of {shown}; {EXPECTED}")
        for name in _COUNTS:
            if getattr(self, name) < 0:
                raise PolicyError(f"a token layout has {name}={getattr(self, name)}; {EXPECTED}")

    @classmethod
    def parse(cls, text: str) -> TokenLayout:
        """Read the text form (`PolicyError` otherwise)."""
        given: dict[str, str] = {}
        for part in text.split(","):
            name, sign, value = (p.strip() for p in part.partition("="))
            known = (*_COUNTS, "grid", "frames", "tokens", "length")
            if not sign or name not in known or name in given:
                raise PolicyError(f"token layout {text!r}: {part.strip()!r}; {EXPECTED}")
            pattern = r"\d+(x\d+){0,2}" if name == "grid" else r"\d+"
            if not re.fullmatch(pattern, value) or len(value) > 40:
                raise PolicyError(f"token layout {text!r}: {name} is {value!r}; {EXPECTED}")
            given[name] = value
        shape = set(given) - set(_COUNTS)
        if shape not in _SHAPES:
            raise PolicyError(f"token layout {text!r} gives no grid, or two; {EXPECTED}")
        names = [n for n in ("grid", "frames", "tokens", "length") if n in shape]
        grid = tuple(int(v) for n in names for v in given[n].split("x"))
        return cls(grid, **{n: int(given[n]) for n in _COUNTS if n in given})

    def __str__(self) -> str:
        match len(self.grid):
            case 1:
                shape = f"length={self.grid[0]}"
            case _:
                shape = f"grid={'x'.join(map(str, self.grid))}"
        counts = [f"{n}={v}" for n in _COUNTS if (v := getattr(self, n))]
        return ",".join([shape, *counts])

    @property
    def tokens(self) -> int:
        """Positions of the grid."""
        return math.prod(self.grid)

    @property
    def q_len(self) -> int:
        """Queries."""
        return self.text + self.tokens + self.suffix + self.padding

    @property
    def kv_len(self) -> int:
        """Keys: as many as queries, and the extra ones."""
        return self.q_len + self.extra

    def misfit(self, q_len: object, kv_len: object) -> str | None:
        """Why sequences of these lengths do not have this layout, or None."""
        if (q_len, kv_len) == (self.q_len, self.kv_len):
            return None
        return (
            f"the layout {self} has {self.q_len} queries and {self.kv_len} keys, but the Site has "
            f"{q_len} and {kv_len}"
        )

    def axes(self, position: Expr) -> tuple[Expr, ...]:
        """Coordinates of a position of the grid, one per axis, slowest first."""
        place = position - self.text if self.text else position
        result = []
        for axis, extent in enumerate(self.grid):
            stride = math.prod(self.grid[axis + 1 :])
            digit = place // stride if stride > 1 else place
            result.append(digit % extent if axis else digit)
        return tuple(result)

    def frames(self) -> TokenLayout:
        """The same tokens as frames of tokens: a grid of two axes (one frame for a plain text)."""
        if len(self.grid) == 2:
            return self
        return TokenLayout(
            (self.grid[0], self.tokens // self.grid[0]) if len(self.grid) == 3 else self.grid,
            **self._counts(),
        )

    def _counts(self) -> Mapping[str, int]:
        return {n: getattr(self, n) for n in _COUNTS}

    def around_grid(self, q: Expr, kv: Expr, inside: Expr) -> Expr:
        """``inside`` between positions of the grid; text sees everything and is seen by all.

        Extra keys are seen by queries of the grid only; padding is seen by no query of the grid or
        of the text, and sees everything (its rows must not be empty, and nobody reads them).
        """
        mask = inside
        end, keys_end = self.text + self.tokens, self.text + self.tokens + self.extra
        q_text, kv_text = self._is_text(q, end), self._is_text(kv, keys_end)
        if self.extra:
            extra = (kv >= end) & (kv < keys_end)
            seen = extra if q_text == FALSE else extra & ~q_text
            mask = ((kv < end) & mask) | seen
            q_text = q_text & ~extra if q_text != FALSE else q_text
        for text in (q_text, kv_text):
            mask = mask if text == FALSE else text | mask
        if self.padding:
            mask = (q >= self.q_len - self.padding) | (mask & (kv < self.kv_len - self.padding))
        return mask

    def _is_text(self, position: Expr, end: int) -> Expr:
        before = position < self.text if self.text else FALSE
        after = position >= end if self.suffix or self.padding else FALSE
        if FALSE in (before, after):
            return before if after == FALSE else after
        return before | after


def plain(length: int) -> TokenLayout:
    """A text of ``length`` tokens."""
    return TokenLayout((length,))
