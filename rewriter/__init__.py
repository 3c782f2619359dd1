"""A compiler-style graph rewriting toolkit for attention.

Importing this package is cheap: a public name imports its module, and with it torch, on first use.

    import attn_rewrite as ar
    ar.find_attention(model, (x,)).sites
    ar.optimize(model, "window(size=256, sinks=4)", (x,)).report
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_rewrite import cascade as cascade
    from attn_rewrite.backends.onnx.export import export_onnx as export_onnx
    from attn_rewrite.budget import Budget as Budget
    from attn_rewrite.calibration import Calibration as Calibration
    from attn_rewrite.driver import find_attention as find_attention
    from attn_rewrite.driver import optimize as optimize
    from attn_rewrite.errors import AttnRewriteError as AttnRewriteError
    from attn_rewrite.errors import CaptureError as CaptureError
    from attn_rewrite.errors import CheckpointError as CheckpointError
    from attn_rewrite.errors import LowerError as LowerError
    from attn_rewrite.errors import PolicyError as PolicyError
    from attn_rewrite.errors import ToolError as ToolError
    from attn_rewrite.errors import VerifyError as VerifyError
    from attn_rewrite.optimized import OptimizedModule as OptimizedModule
    from attn_rewrite.plan import Plan as Plan
    from attn_rewrite.policy import Policy as Policy
    from attn_rewrite.policy import Rule as Rule
    from attn_rewrite.policy import Where as Where
    from attn_rewrite.saved import load as load
    from attn_rewrite.saved import save as save
    from attn_rewrite.site import Findings as Findings
    from attn_rewrite.site import Refusal as Refusal
    from attn_rewrite.site import Site as Site

    __version__: str

# Where each public name lives.  No submodule may have the name of a public function: importing
# the submodule would put the module in the function's place.
_HOME = {
    "AttnRewriteError": "errors",
    "Budget": "budget",
    "Calibration": "calibration",
    "CaptureError": "errors",
    "CheckpointError": "errors",
    "Findings": "site",
    "LowerError": "errors",
    "OptimizedModule": "optimized",
    "Plan": "plan",
    "Policy": "policy",
    "PolicyError": "errors",
    "Refusal": "site",
    "Rule": "policy",
    "Site": "site",
    "ToolError": "errors",
    "VerifyError": "errors",
    "Where": "policy",
    "export_onnx": "backends.onnx.export",
    "find_attention": "driver",
    "load": "saved",
    "optimize": "driver",
    "save": "saved",
}

__all__ = [*_HOME, "__version__", "cascade"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name == "cascade":
        value = importlib.import_module(f"{__name__}.cascade")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("attn-rewrite")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
