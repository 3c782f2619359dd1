"""Kernels lowered from cascades: torch, onnx, triton."""
