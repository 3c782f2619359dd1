"""Exact FX passes: one normal form per meaning."""
