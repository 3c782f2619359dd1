"""Cascades lowered to PyTorch operators."""
