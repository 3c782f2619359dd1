"""Run rows and write RESULTS.md: ``python -m tests.zoo [PATTERN ...] [--all]``."""

from __future__ import annotations

import argparse
import fnmatch

from tests.zoo.bench import Bench
from tests.zoo.choice import chosen
from tests.zoo.registry import LIBRARIES, rows
from tests.zoo.results import record, recorded, write


def main() -> None:
    """Run the rows that match a pattern (the rows of the suite without one)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", help="such as 'timm/*' or '*/llama/eager'")
    parser.add_argument(
        "--all", action="store_true", help="the whole registries, not the suite's rows"
    )
    options = parser.parse_args()
    names = (
        [n for library in LIBRARIES for n in rows(library)]
        if options.all
        else [name for speed in ("fast", "all") for name in chosen(speed)]
    )
    patterns = options.patterns or ["*"]
    with Bench() as bench:
        for name in names:
            if any(fnmatch.fnmatch(name, p) for p in patterns):
                record(bench.examine(name, ("float32", "bfloat16")))
    write(recorded())


if __name__ == "__main__":
    main()
