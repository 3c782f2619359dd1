"""Tests of generated kernels under Triton's interpreter; `test_triton_interpreted` runs them."""
