"""A writer of indented source text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Writer:
    """Lines of source at a current indentation of four spaces a level."""

    lines: list[str] = field(default_factory=list)
    depth: int = 0

    def line(self, text: str = "") -> None:
        """Append a line; an empty one is not indented."""
        self.lines.append("    " * self.depth + text if text else "")

    def comment(self, text: str) -> None:
        """Append a comment."""
        self.line(f"# {text}")

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Append ``head`` and indent what follows."""
        self.line(head)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    @property
    def text(self) -> str:
        """Everything written so far, ending in a newline."""
        return "\n".join(self.lines) + "\n"
