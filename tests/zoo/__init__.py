"""Every attention of the model libraries: found, and rewritten without changing the numbers."""
