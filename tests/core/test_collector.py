"""Check that the garbage collector is put back as it was."""

import gc

import pytest

from effcompile.core.collector import paused


def fail() -> None:
    with paused():
        assert not gc.isenabled()
        raise ZeroDivisionError


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_off_inside_and_as_before_outside(on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ZeroDivisionError):
            fail()
        assert gc.isenabled() is on
    finally:
        (gc.enable if before else gc.disable)()
