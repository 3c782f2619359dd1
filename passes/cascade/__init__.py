"""Rewrites of cascades: defer, partition, fuse_reductions."""
