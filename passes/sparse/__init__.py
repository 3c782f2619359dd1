"""Sparse patterns, one per file: which (query, key) pairs are kept."""

# "module:Class" of every pattern a policy may name; a new pattern is one line here.
PATTERNS: tuple[str, ...] = ("window:Window",)
