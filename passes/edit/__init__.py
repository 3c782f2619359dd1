"""Edits of the score before the softmax, one per file."""

# "module:Class" of every edit a policy may name; a new edit is one line here.
EDITS: tuple[str, ...] = (
    "softcap:Softcap",
    "alibi:Alibi",
)
