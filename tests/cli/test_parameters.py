"""Check how sizes, dtypes, options and names are read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effcompile.cli.parameters import import_name, parse_dtype, parse_options, parse_shape
from effcompile.core.errors import EffError
from tests.cli.samples import WrongActivation


def test_sizes() -> None:
    assert parse_shape("b=1,s=32k") == {"batch": 1, "seq": 32768}
    assert parse_shape(" batch = 4 , SEQ=7 ") == {"batch": 4, "seq": 7}
    assert parse_shape("") == {}


@given(st.integers(1, 10**6), st.sampled_from(["", "k"]))
def test_sizes_scale(number: int, suffix: str) -> None:
    assert parse_shape(f"s={number}{suffix}") == {"seq": number * (1024 if suffix else 1)}


@pytest.mark.parametrize("text", ["s=0", "s=-1", "s=", "s", "s=1.5", "s=kk", "z=1"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(EffError) as caught:
        parse_shape(text)
    assert caught.value.code == "EFF-U203"


def test_dtypes() -> None:
    assert parse_dtype("") is None
    assert parse_dtype("bf16") is torch.bfloat16
    assert parse_dtype("torch.float16") is torch.float16


def test_options_keep_their_types() -> None:
    found = parse_options(
        ["strict=true", "mode=max-autotune", "inductor.cpp_wrapper=false", "inductor.x=3", "disable=a,b", "disable=c"],
        ["attention=all"],
        ["tests.cli.samples:WrongActivation"],
    )
    assert found == {
        "strict": True,
        "mode": "max-autotune",
        "inductor": {"cpp_wrapper": False, "x": 3},
        "disable": ("a", "b", "c"),
        "require": {"attention": "all"},
        "passes": (WrongActivation(),),
    }


@pytest.mark.parametrize("text", ["tests.cli.samples", "tests.cli.samples:WrongActivatoin", "tests.cli.sample:x"])
def test_names_that_are_not_there(text: str) -> None:
    with pytest.raises(EffError) as caught:
        import_name(text)
    assert caught.value.code == "EFF-U206"


def test_a_pass_must_be_a_pass() -> None:
    with pytest.raises(EffError, match="no Pass"):
        parse_options(None, None, ["tests.cli.samples:Stack"])
