"""Variants of attention as text, in the notation of `paper`."""

from __future__ import annotations

TEXTS: dict[str, str] = {}
