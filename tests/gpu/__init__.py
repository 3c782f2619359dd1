"""Tests that run kernels on a GPU: ``make gpu-test``."""
