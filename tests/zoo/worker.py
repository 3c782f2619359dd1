"""Examine rows in a process of its own: names come in on stdin, results go out as JSON lines."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import warnings

import torch


def quiet() -> None:
    """Libraries say a lot while models are made; results are what counts here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def main() -> None:
    """Serve until stdin ends."""
    quiet()
    from tests.zoo.examine import examine
    from tests.zoo.registry import row

    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not a result
    for line in sys.stdin:
        name, sizes, *dtypes = line.split()
        types = tuple(getattr(torch, d) for d in dtypes)
        result = examine(row(name), types, fixed=sizes == "fixed")
        channel.write(json.dumps(dataclasses.asdict(result)) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
