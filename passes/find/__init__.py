"""Find attention by meaning: softmax-anchored, symbolic-axis matching."""
