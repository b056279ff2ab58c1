"""Send every test of this folder to a child process in which Triton interprets kernels (tests/support/interpreter.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.interpreter import Child, interpreting, prepare

pytest.importorskip("triton")
if interpreting():
    prepare()


@pytest.fixture(scope="session")
def child() -> Iterator[Child]:
    """Start the child with the first test that needs it."""
    started = Child.start(Path(__file__).parent)
    yield started
    started.process.kill()
    started.process.wait()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests of this folder, and only those, ask for the child."""
    if interpreting():
        return
    for item in items:
        if isinstance(item, pytest.Function) and "interpreted" in item.path.parts:
            item.fixturenames.append("child")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the test in the child and report what it reports."""
    if interpreting():
        return None
    outcome, text = pyfuncitem.funcargs["child"].ask(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True
