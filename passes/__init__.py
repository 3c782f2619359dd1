"""Passes over FX graphs and cascades; one pass, pattern or scheme per file."""
