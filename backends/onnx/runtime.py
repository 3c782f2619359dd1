"""ONNX Runtime, found and opened: which wheel is installed, sessions that behave on few cores."""

from __future__ import annotations

import collections
import importlib.metadata
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_rewrite.errors import PolicyError, ToolError

STAGE = "onnxruntime"
Provider = str | tuple[str, Mapping[str, Any]]
Providers = str | Sequence[Provider]
WHEELS = ("onnxruntime", "onnxruntime-gpu")
THREADS = 2
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def require_exporter() -> None:
    """Raise `ToolError` unless the packages that write ONNX are installed."""
    missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
    if missing:
        raise ToolError(
            f"the ONNX export needs {' and '.join(missing)}, not installed here; "
            "install the extra: pip install 'attn-rewrite[onnx]'.",
            stage="onnx",
        )


def runtime() -> Any:
    """The imported module ``onnxruntime``; `ToolError` where it is missing or broken."""
    found = [wheel for wheel in WHEELS if _installed(wheel)]
    both = len(found) == len(WHEELS)
    try:
        import onnxruntime
    except ImportError as error:
        what = f"ONNX Runtime cannot be imported ({error})"
        raise ToolError(f"{what}; {_remedy(both)}", stage=STAGE) from error
    if not hasattr(onnxruntime, "InferenceSession"):  # what uninstalling one of two wheels leaves
        raise ToolError(f"ONNX Runtime is installed but empty; {_remedy(True)}", stage=STAGE)
    return onnxruntime


def _remedy(both: bool) -> str:
    if both:
        return (
            "onnxruntime and onnxruntime-gpu share one package folder and damage each other: "
            "uninstall both, then install one."
        )
    return "install the extra: pip install 'attn-rewrite[onnx]' (or [onnx-gpu])."


def both_wheels() -> bool:
    """True where both wheels are installed: the one installed last is what runs."""
    return all(_installed(wheel) for wheel in WHEELS)


def providers_of(provider: str) -> Providers:
    """The providers of a file that was written for ``provider``, "cpu" or "cuda"."""
    return (CUDA, CPU) if provider == "cuda" else (CPU,)


def require_provider(provider: str) -> None:
    """Raise `ToolError` unless this build of ONNX Runtime has ``provider``, "cpu" or "cuda".

    Whether it starts is known once a session is opened.
    """
    ort, name = runtime(), CUDA if provider == "cuda" else CPU
    have = ort.get_available_providers()
    if name not in have:
        raise ToolError(
            f"ONNX Runtime {ort.__version__} is built without {name} (it has {', '.join(have)}); "
            "install onnxruntime-gpu in the place of onnxruntime, or ask for the CPU.",
            stage=STAGE,
        )


def open_session(
    path: Path,
    providers: Providers | None = None,
    *,
    threads: int = THREADS,
    prepack: bool = True,
    profile: Path | None = None,
) -> Any:
    """An ``InferenceSession`` on ``path``; `ToolError` where it cannot be loaded.

    ``providers`` are names, each alone or with its options, in the order of preference; None is the
    CPU's.  `PolicyError` where they are something else.

    The pool does not spin (other sessions and processes share the cores).  A provider that was
    asked for and did not start is an error, never a silent fall back to the CPU; single nodes that
    an accelerator leaves to the CPU are listed in a ``RuntimeWarning``.  ``prepack`` False
    leaves weights as they are in the file: slower to run, faster to load, no second copy.
    ``profile`` is the start of the name of a file that says where each node ran.
    """
    ort, wanted = runtime(), _named(providers)
    if threads < 1:
        raise PolicyError(f"threads is {threads}, expected at least 1.")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if set(wanted) != {CPU}:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    _require(ort, tuple(wanted), ort.get_available_providers())
    try:
        session = ort.InferenceSession(str(path), options, providers=list(wanted.items()))
    except Exception as error:
        raise ToolError(
            f"ONNX Runtime {ort.__version__} cannot load {path.name}: {_first_line(error)}",
            stage=STAGE,
        ) from error
    _require(ort, tuple(wanted), session.get_providers())
    if set(wanted) != {CPU}:
        _say_what_fell_back(session, path, [p for p in wanted if p != CPU])
    return session


def _named(providers: Providers | None) -> dict[str, Mapping[str, Any]]:
    """The options of each provider by its name, in the order of preference."""
    given = [providers] if isinstance(providers, str) else [CPU] if providers is None else providers
    found: dict[str, Mapping[str, Any]] = {}
    for one in given:
        name, options = one if isinstance(one, tuple) and len(one) == 2 else (one, {})
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise PolicyError(
                f"a provider is a name, or a name and its options, got {one!r}; {CPU} is one."
            )
        found[name] = options
    if not found:
        raise PolicyError(f"no provider is named; leave providers out for {CPU}.")
    return found


def _say_what_fell_back(session: Any, path: Path, wanted: Sequence[str]) -> None:
    """Warn of the nodes that the providers ``wanted`` do not run."""
    parts = [p for p in session.get_provider_graph_assignment_info() if p.ep_name == CPU]
    names = collections.Counter(node.op_type for part in parts for node in part.get_nodes())
    if names:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
        warnings.warn(
            f"{path.name}: {names.total()} nodes run on the CPU, not on {', '.join(wanted)}: "
            f"{listed}; `OnnxArtifact.placement` says where each operator ran",
            RuntimeWarning,
            stacklevel=3,
        )


def _require(ort: Any, wanted: Sequence[str], started: Sequence[str]) -> None:
    absent = [p for p in wanted if p not in started]
    if absent:
        have = ", ".join(ort.get_available_providers())
        raise ToolError(
            f"ONNX Runtime {ort.__version__} did not start {', '.join(absent)} (it has {have}); "
            "install its libraries or ask for another provider.",
            stage=STAGE,
        )


def run_session(session: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by name; `ToolError` where ONNX Runtime fails."""
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:
        raise ToolError(
            f"ONNX Runtime failed while running: {_first_line(error)}", stage=STAGE
        ) from error


def placement(
    path: Path, inputs: Mapping[str, Any], providers: Providers | None = None
) -> dict[str, tuple[str, ...]]:
    """Operators by the provider that ran them, nested graphs included, in one profiled run."""
    with tempfile.TemporaryDirectory(prefix="attn-rewrite-") as folder:
        session = open_session(path, providers, profile=Path(folder) / "run")
        run_session(session, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, set[str]] = {}
    for event in events:
        given = event.get("args", {})
        if given.get("provider") and given.get("op_name"):
            found.setdefault(given["provider"], set()).add(given["op_name"])
    return {provider: tuple(sorted(names)) for provider, names in sorted(found.items())}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
