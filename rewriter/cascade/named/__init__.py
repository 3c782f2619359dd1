"""Named cascades: those of the FuseMax paper and the variants of attention (`NAMED`).

Each is kept as text and parsed when it is first asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

from attn_rewrite.cascade.named import paper, variants

if TYPE_CHECKING:
    from attn_rewrite.cascade.ir import Cascade

_TEXTS: dict[str, str] = {**paper.TEXTS, **variants.TEXTS}


class _Library(Mapping[str, "Cascade"]):
    """Cascades by name; a name that is not there raises `KeyError` with the nearest one."""

    def __getitem__(self, name: str) -> Cascade:
        if name not in _TEXTS:
            near = difflib.get_close_matches(str(name), _TEXTS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_TEXTS)}"
            raise KeyError(f"no named cascade {name!r}; {hint}")
        return _parsed(name)

    def __contains__(self, name: object) -> bool:
        return name in _TEXTS

    def __iter__(self) -> Iterator[str]:
        return iter(_TEXTS)

    def __len__(self) -> int:
        return len(_TEXTS)


@cache
def _parsed(name: str) -> Cascade:
    from attn_rewrite.cascade.text import parse

    return parse(f"cascade {name}\n{_TEXTS[name]}")


NAMED: Mapping[str, Cascade] = _Library()
