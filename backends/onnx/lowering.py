"""How one attention left for ONNX, as a value for reports and the file's metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SPARSE = "SparseAttention"
_SKIPS = ("tiles", "half", "blocks", "einsums", "GroupQueryAttention", SPARSE)


@dataclass(frozen=True)
class SiteLowering:
    """How one attention left for ONNX.

    ``form`` is ``"tiles"`` (keys outside the mask's bands are never read), ``"half"`` (keys beyond
    the one side that the mask bounds, as the upper half under a causal one), ``"blocks"`` (only the
    blocks its mask keeps at these lengths: ``tiles`` are those and all), ``"dense mask"`` (every
    key is read and the mask applied: nothing is saved), ``"dense"`` (MatMul and Softmax over all
    keys), ``"einsums"`` (the Einsums of a cascade, none over every pair of a query and a key),
    ``"operators"`` (the graph's own) or the name of an operator
    (``GroupQueryAttention`` skips what lies above the diagonal, ``SparseAttention`` on CUDA all
    that its lists leave out).  ``detail`` says more in words;
    ``rows`` and ``width`` are the queries and keys of a step of the tiled form; ``choice`` says,
    for the target ``onnxruntime``, why this form and not one of its own operators.  Where an ``If``
    on the length decides, ``short`` is the form that runs where ``axis`` is up to ``switch``.
    ``covered``: the mask leaves out no whole block that this form does not (or, at fixed lengths,
    so few that lists of them cost more).
    """

    name: str
    operator: str
    form: str
    detail: str
    rows: int | None = None
    width: int | None = None
    tiles: tuple[int, int] | None = None
    choice: str = ""
    short: str = ""
    switch: int | None = None
    axis: str = ""
    covered: bool = False

    @property
    def skips(self) -> bool:
        """True where the lowering really leaves out what the mask excludes."""
        return self.form in _SKIPS

    def to_json(self) -> dict[str, Any]:
        """Plain values for metadata and reports."""
        return {
            "name": self.name,
            "operator": self.operator,
            "form": self.form,
            "detail": self.detail,
            "rows": self.rows,
            "width": self.width,
            "tiles": None if self.tiles is None else list(self.tiles),
            "skips": self.skips,
            "choice": self.choice,
            "short": self.short,
            "switch": self.switch,
            "axis": self.axis,
            "covered": self.covered,
        }
