"""Which rows the suite runs: by place in the registries, not by hand."""

from __future__ import annotations

from tests.zoo.registry import rows

# Of so many consecutive rows of a registry one is run (rows of transformers and timm come in
# pairs of
# spellings, and an architecture is run in both).
_STRIDES = {
    "fast": {"torch": 8, "transformers": 70},
    "slow": {"torch": 1, "transformers": 5, "diffusers": 1, "timm": 1},
}


def chosen(speed: str) -> list[str]:
    """Names of the ``fast`` rows, or of the ``slow`` ones (which leave the fast ones out)."""
    names = [
        row.name
        for library, stride in _STRIDES[speed].items()
        for architecture in _architectures(library)[::stride]
        for row in rows(library).values()
        if row.architecture == architecture
    ]
    return names if speed == "fast" else [n for n in names if n not in set(chosen("fast"))]


def _architectures(library: str) -> list[str]:
    return list(dict.fromkeys(r.architecture for r in rows(library).values()))
