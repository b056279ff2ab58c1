"""Check that a C++ source of ours that cannot be built is told, not replaced in silence."""

from __future__ import annotations

import pytest
from torch._inductor import codecache, cpu_vec_isa, exc

from effcompile.ops import native


def test_a_source_that_does_not_compile_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str) -> None:
        raise exc.CppCompileError(["g++"], "error: no such thing")

    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: True)
    monkeypatch.setattr(codecache.CppCodeCache, "load", refuse)
    with pytest.warns(UserWarning, match=r"pages\.cpp could not be compiled.*no such thing"):
        assert native.build("tiles.h", "pages.cpp") is None


def test_without_vector_instructions_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: False)
    assert native.build("tiles.h", "pages.cpp") is None
