"""Cascades lowered to ONNX."""
