"""Sparse patterns, one per file: which (query, key) pairs are kept."""

# "module:Class" of every pattern a policy may name; a new pattern is one line here.
PATTERNS: tuple[str, ...] = (
    "window:Window",
    "streaming:Streaming",
    "chunked:Chunked",
    "prefix:Prefix",
    "neighborhood:Neighborhood",
    "neighborhood:Gna",
    "sta:Sta",
    "swin:Swin",
    "clear:Clear",
    "radial:Radial",
    "tile:Tile",
    "s2:S2",
    "longlora:LongLora",
    "longformer:Longformer",
    "bigbird:BigBird",
    "blocks:Blocks",
    "paro:Paro",
    "combiner:Combiner",
    "union:Union",
    "union:Intersection",
)
