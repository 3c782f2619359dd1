"""Orders of tokens: the transform that reorders a Site, and what makes a graph of them cheap."""

# "module:Class" of every transform a policy may name.
ORDERS: tuple[str, ...] = ("reorder:Reorder",)
