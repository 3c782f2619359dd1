"""Quantised attention: number formats, where their scales may stand, and one scheme per file."""

# "module:Class" of every scheme a policy may name; a new scheme is one line here.
SCHEMES: tuple[str, ...] = (
    "int8:Int8",
    "int8:Int4",
    "fp8:Fp8",
    "fp4:Fp4",
    "dgq:Dgq",
    "kv_cache:KvInt8",
    "kv_cache:KvInt4",
    "kv_cache:KvInt2",
    "clipped:ClippedSoftmax",
    "gated:Gated",
    "calibrated:Calibrated",
)
