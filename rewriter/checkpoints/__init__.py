"""Readers of one kind of model source each; `attn_rewrite.checkpoint.load_model` picks one."""
