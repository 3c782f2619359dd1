"""Every exception class of the project.

A message says what was found, where (node as text and the user's source line), what was expected
and what to do.  The command line prints it as one sentence and exits with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_rewrite.site import Refusal


class AttnRewriteError(Exception):
    """Base class; ``exit_code`` is what the command line exits with."""

    exit_code = 70


class CaptureError(AttnRewriteError):
    """The model cannot be captured as a graph."""

    exit_code = 3


class PolicyError(AttnRewriteError, ValueError):
    """The policy, or another option given by the user, is not valid."""

    exit_code = 2


class CascadeError(AttnRewriteError, ValueError):
    """A cascade is not well formed or cannot be scheduled."""

    exit_code = 2


class CheckpointError(AttnRewriteError):
    """A checkpoint or saved result cannot be read."""

    exit_code = 3


class VerifyError(AttnRewriteError):
    """A rewrite changed numbers beyond its bound, or broke the graph: our bug."""

    exit_code = 4


class LowerError(AttnRewriteError):
    """A backend cannot lower a cascade; ``refusals`` say which and why."""

    exit_code = 5

    def __init__(self, message: str, refusals: Sequence[Refusal] = ()) -> None:
        super().__init__(message)
        self.refusals = tuple(refusals)


class ToolError(AttnRewriteError):
    """A tool the project drives (Triton, ONNX Runtime, the disk) failed at ``stage``."""

    exit_code = 5

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message)
        self.stage = stage
