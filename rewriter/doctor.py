"""What is installed and what of it works, for ``attn-rewrite doctor``.

A package that is installed may still be unusable (a wheel for another processor, two wheels that
overwrite each other): each one is asked to do a little of what this project needs it for.
"""

from __future__ import annotations

import enum
import importlib
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class Status(enum.StrEnum):
    """Outcome of a check."""

    WORKS = "works"
    MISSING = "missing"
    BROKEN = "broken"


@dataclass(frozen=True)
class Check:
    """One thing that was tried: its version where it has one, and what to know or do."""

    name: str
    status: Status
    version: str = ""
    detail: str = ""

    def to_json(self) -> dict[str, str]:
        """Plain values."""
        return {
            "name": self.name,
            "status": self.status.value,
            "version": self.version,
            "detail": self.detail,
        }


def examine() -> tuple[Check, ...]:
    """Try everything; an optional package that is missing says which extra brings it."""
    here = f"{platform.system()} {platform.machine()}"
    return (
        Check("python", Status.WORKS, platform.python_version(), f"{sys.executable}, {here}"),
        Check("attn-rewrite", Status.WORKS, _version("attn-rewrite") or "not installed"),
        *(_tried(name, extra, trial) for name, extra, trial in _TRIALS),
        _one_onnxruntime(),
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _tried(name: str, extra: str, trial: Callable[[Any], str]) -> Check:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return Check(name, Status.MISSING, "", f"pip install 'attn-rewrite{extra}'")
        return Check(name, Status.BROKEN, "", f"it needs {error.name}, which is not installed")
    except Exception as error:
        return Check(name, Status.BROKEN, "", _sentence(error))
    found = str(getattr(module, "__version__", "") or _version(name) or "")
    try:
        return Check(name, Status.WORKS, found, trial(module))
    except Exception as error:
        return Check(name, Status.BROKEN, found, _sentence(error))


def _sentence(error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first}"


def _torch(torch: Any) -> str:
    class Twice(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return x + x

    torch.export.export(Twice(), (torch.ones(2),))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"export works; GPU: {', '.join(names)}"
    return f"export works; no GPU, {torch.get_num_threads()} CPU threads"


def _triton(triton: Any) -> str:
    targets = ", ".join(sorted(importlib.import_module("triton.backends").backends))
    return f"compiles for {targets}"


def _onnxruntime(ort: Any) -> str:
    onnx = importlib.import_module("onnx")
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "doctor", value[:1], value[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return f"a session opens; providers: {', '.join(ort.get_available_providers())}"


def _one_onnxruntime() -> Check:
    name = "one onnxruntime"
    wheels = [w for w in ("onnxruntime", "onnxruntime-gpu") if _version(w)]
    if len(wheels) < 2:
        return Check(name, Status.WORKS, "", wheels[0] if wheels else "none installed")
    advice = "both wheels are installed and overwrite each other: uninstall both, then install one"
    return Check(name, Status.BROKEN, "", advice)


def _imports(module: Any) -> str:
    return ""


_TRIALS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("torch", "", _torch),
    ("numpy", "", _imports),
    ("networkx", "", _imports),
    ("sympy", "", _imports),
    ("safetensors", "", _imports),
    ("transformers", "[hf]", _imports),
    ("tokenizers", "[hf]", _imports),
    ("diffusers", "[diffusers]", _imports),
    ("triton", "[triton]", _triton),
    ("onnx", "[onnx]", _imports),
    ("onnxscript", "[onnx]", _imports),
    ("onnxruntime", "[onnx]", _onnxruntime),
    ("matplotlib", "[plot]", _imports),
)
