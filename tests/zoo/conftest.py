"""One bench for the session, and the table at its end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.zoo.bench import Bench
from tests.zoo.results import recorded, write


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """The process that examines rows."""
    with Bench() as bench:
        yield bench


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table of all rows run so far, once, when the processes of a parallel run are
    done."""
    if not hasattr(session.config, "workerinput") and (results := recorded()):
        write(results, session.config.rootpath / "build" / "zoo.md")
