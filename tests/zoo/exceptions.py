"""Rows that are not found in full, each with its reason: `test_zoo` fails when one starts to
work."""

from __future__ import annotations

# Architecture -> why.
EXCEPTIONS: dict[str, str] = {}
