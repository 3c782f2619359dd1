"""The exported file as a value: what it contains, a session on it, and a check of its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attn_rewrite.backends.onnx.lowering import SiteLowering
from attn_rewrite.backends.onnx.options import CPU
from attn_rewrite.backends.onnx.runtime import (
    STAGE,
    Providers,
    open_session,
    placement,
    providers_of,
    run_session,
)
from attn_rewrite.errors import PolicyError, ToolError, VerifyError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from attn_rewrite.backends.onnx.codes import Codes

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: name, element type, and extents (int, or the name of a dynamic axis)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxArtifact:
    """An ONNX file that was written: where, for what, and how each attention was lowered.

    ``bytes`` counts the file and its external data.  ``sites`` says for every attention whether the
    file really skips work (`SiteLowering.skips`) or applies a dense mask.  ``errors`` holds the
    largest error per output that the check at export found; ``source`` the program it came from;
    ``codes`` what the numbers of an int8 cache stand for, ``approximation`` the relative root mean
    square of what they change in every output of the example.  ``provider`` is what the file was
    written for; for "cuda" ``checked`` says what the export compared, which is never the file on
    CUDA, and ``operator_errors`` the largest error of each ``SparseAttention`` on the CPU, by its
    function.
    """

    path: Path
    opset: int
    target: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sites: tuple[SiteLowering, ...]
    bytes: int
    errors: Mapping[str, float] = field(default_factory=dict, compare=False)
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    source: ExportedProgram | None = field(default=None, compare=False, repr=False)
    approximation: Mapping[str, float] = field(default_factory=dict, compare=False)
    codes: Codes | None = field(default=None, compare=False, repr=False)
    provider: str = CPU
    checked: str = ""
    operator_errors: Mapping[str, float] = field(default_factory=dict, compare=False)

    def session(self, providers: Providers | None = None, *, threads: int = 2) -> Any:
        """An ``onnxruntime.InferenceSession`` (on the file's provider, unless ``providers`` says
        otherwise).

        `ToolError` where the file cannot be loaded or a provider did not start; a `RuntimeWarning`
        lists the nodes that a provider other than the CPU's leaves to the CPU.
        """
        return open_session(self.path, self._providers(providers), threads=threads)

    def run(self, inputs: Arrays, *, in_child: bool = False) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name; ``in_child`` opens the session in a process of its own."""
        return self.run_all([inputs], in_child=in_child)[0]

    def run_all(
        self, runs: Sequence[Arrays], *, in_child: bool = False
    ) -> list[dict[str, np.ndarray[Any, Any]]]:
        """Outputs by name for several sets of inputs, in one session."""
        if in_child:
            if self.provider != CPU:
                raise PolicyError(f"in_child= runs on the CPU, and {self.path.name} is for CUDA.")
            from attn_rewrite.backends.onnx.child import run_in_child

            return run_in_child(self.path, [self._complete(inputs) for inputs in runs])[0]
        session = self.session()
        return [run_session(session, self._complete(inputs)) for inputs in runs]

    def placement(
        self, inputs: Arrays, providers: Providers | None = None
    ) -> dict[str, tuple[str, ...]]:
        """The operators that ran on each provider in one run with ``inputs``, sorted.

        With an accelerator asked for, what stands under ``CPUExecutionProvider`` fell back.
        """
        return placement(self.path, self._complete(inputs), self._providers(providers))

    def _providers(self, given: Providers | None) -> Providers:
        return providers_of(self.provider) if given is None else given

    def _named(self, inputs: object) -> Mapping[str, Any]:
        """Inputs by name, also where they were given in the file's order."""
        if isinstance(inputs, Mapping):
            return inputs
        names = [s.name for s in self.inputs]
        if isinstance(inputs, list | tuple) and len(inputs) == len(names):
            return dict(zip(names, inputs, strict=True))
        kind = type(inputs).__name__
        raise ToolError(
            f"{self.path.name} takes arrays by the names {', '.join(names)}, or all of them in "
            f"this order, got a {kind}.",
            stage=STAGE,
        )

    def _complete(self, inputs: object) -> dict[str, np.ndarray[Any, Any]]:
        """The inputs as the file takes them; `ToolError` where they are others."""
        names, inputs = [s.name for s in self.inputs], self._named(inputs)
        missing = [n for n in names if n not in inputs]
        if missing:
            raise ToolError(f"{self.path.name} needs input {', '.join(missing)}.", stage=STAGE)
        strange = [str(n) for n in inputs if n not in names]
        if strange:
            raise ToolError(
                f"{self.path.name} has no input {', '.join(strange)}; it takes {', '.join(names)}.",
                stage=STAGE,
            )
        return {s.name: _fitting(self.path.name, s, inputs[s.name]) for s in self.inputs}

    def verify(
        self,
        inputs: Arrays,
        reference: Arrays | None = None,
        *,
        bound: Mapping[str, float] | None = None,
        in_child: bool = False,
    ) -> dict[str, float]:
        """Run the file and compare: the largest absolute error of every output, by name.

        ``inputs`` by name, or all of them in the file's order.
        ``reference`` holds the expected outputs (float64 where the caller has them) and ``bound``
        the error allowed per output; without one it is ``4 eps x max|reference|`` of the output's
        type.  Without a reference the program the file was made from is run, in its own types and
        in float64, and gives both.  NaN in the reference is left out of the comparison.  Raises
        `VerifyError` when an error is over its bound or a shape differs, `ToolError` when ONNX
        Runtime fails, ValueError when there is nothing to compare with.
        """
        if reference is None:
            if self.source is None:
                raise ValueError(f"{self.path.name} is not held with its program: give reference=.")
            got, arrays = self.run(inputs, in_child=in_child), self._complete(inputs)
            given = dict(self._named(inputs))  # a size stays the number it is
            given |= {n: arrays[n] for n, x in given.items() if isinstance(x, list | tuple)}
            return against_program(self.path.name, self.source, self.codes, given, got)
        return compare(self.path.name, self.run(inputs, in_child=in_child), reference, bound)


def _fitting(what: str, spec: TensorSpec, given: Any) -> np.ndarray[Any, Any]:
    """``given`` as an array that fits ``spec``; plain numbers and lists take its type."""
    plain = isinstance(given, bool | int | float | list | tuple)
    try:
        array: np.ndarray[Any, Any] = np.asarray(given, spec.dtype if plain else None)
    except (TypeError, ValueError) as error:
        raise ToolError(f"{what}: input {spec.name!r} is no array: {error}", stage=STAGE) from error
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(axis, str) or axis == size
        for axis, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or str(array.dtype) != spec.dtype:
        raise ToolError(
            f"{what} takes input {spec.name!r} as {spec.dtype} {_shape(spec.shape)}, got "
            f"{array.dtype} {_shape(array.shape)}.",
            stage=STAGE,
        )
    return array


def _shape(extents: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, extents))}]"


def against_program(
    what: str, program: ExportedProgram, codes: Codes | None, inputs: Arrays, got: Arrays
) -> dict[str, float]:
    """Errors of a file's outputs ``got`` for ``inputs`` against ``program``, by output.

    Codes of an int8 cache have to be the nearest ones, within the rounding of the program's own
    types (their errors are in steps); everything else is compared with what the program makes of
    the file's own codes.  Raises `VerifyError` as `compare` does.
    """
    from attn_rewrite.backends.onnx.explanation import explained
    from attn_rewrite.backends.onnx.oracle import expected

    if codes is None:
        found = expected(program, inputs)
        off = errors_of(what, got, found.outputs)
        found = explained(program, inputs, found, got, off)
        return compare(what, got, found.outputs, found.bounds)
    held = codes.numbers({n: a for n, a in got.items() if n.startswith("present.")})
    numbers = codes.numbers(inputs)
    found = expected(program, numbers, held)
    rest = {n: a for n, a in found.outputs.items() if n not in held}
    found = explained(program, numbers, found, got, errors_of(what, got, rest), held)
    errors = compare(what, got, rest, found.bounds)
    return errors | codes.check(got, found.appended, found.bounds)


def errors_of(what: str, got: Arrays, reference: Arrays) -> dict[str, float]:
    """Largest absolute error per output of ``reference``; `VerifyError` where one is missing or has
    another shape."""
    for name in reference:
        if name not in got:
            raise VerifyError(f"{what} has no output {name!r}; it has {', '.join(got)}.")
    return {n: _error(what, n, got[n], np.asarray(array)) for n, array in reference.items()}


def compare(
    what: str, got: Arrays, reference: Arrays, bound: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Largest absolute error per output of ``reference``; `VerifyError` where one is over bound."""
    errors = errors_of(what, got, reference)
    for name, expected in reference.items():
        if bound is not None and name not in bound:
            raise PolicyError(f"bound has no {name!r}; give one for every output of the reference.")
        allowed = _default_bound(got[name], expected) if bound is None else bound[name]
        if not errors[name] <= allowed:
            raise VerifyError(
                f"{what}: output {name!r} is off by {errors[name]:.3g}, allowed "
                f"{allowed:.3g}; the export is wrong, please report it with the model."
            )
    return errors


def _error(
    what: str, name: str, got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> float:
    if got.shape != expected.shape:
        raise VerifyError(
            f"{what}: output {name!r} has shape {got.shape}, expected {expected.shape}; the file "
            "is no export of this model, or the export is wrong."
        )
    if got.size == 0:
        return 0.0
    if got.dtype.kind not in "fV":
        return float(np.max(np.abs(got.astype(np.float64) - expected.astype(np.float64))))
    wide, counted = expected.astype(np.float64), ~np.isnan(expected.astype(np.float64))
    with np.errstate(invalid="ignore"):
        gap = np.abs(got.astype(np.float64) - wide)
    gap = np.where(got.astype(np.float64) == wide, 0.0, gap)  # equal infinities
    kept = gap[counted]
    return float("nan") if np.isnan(kept).any() else float(np.max(kept, initial=0.0))


def _default_bound(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    if got.dtype.kind != "f":
        return 0.0
    finite = np.abs(expected[np.isfinite(expected)]) if expected.size else np.zeros(1)
    return 4 * float(np.finfo(got.dtype).eps) * float(np.max(finite, initial=0.0))
