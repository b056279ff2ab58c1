"""Check that code from TorchInductor's caches on disk runs only where it was made for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.utils import fresh_cache

from effcompile.core import processor
from effcompile.ops import native


@pytest.fixture(autouse=True, scope="module")
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


def adding(number: int) -> Callable[[Tensor], Tensor]:
    """Return a function that no other test compiles."""
    return lambda x: torch.sin(x) + torch.arange(x.shape[-1]) + number


def from_the_cache(function: Callable[[Tensor], Tensor], **options: object) -> bool:
    """Tell whether the graph's code came from the cache, after checking what it gives."""
    torch._dynamo.reset()
    counters.clear()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    run = torch.compile(function, backend="eff", options=options or None)
    torch.testing.assert_close(run(x), function(x))
    return bool(counters["inductor"]["fxgraph_cache_hit"])


def sources() -> set[str]:
    from torch._inductor.runtime.runtime_utils import cache_dir

    return {path.read_text() for path in Path(cache_dir()).rglob("*.main.cpp")}


def test_each_instruction_set_has_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    function = adding(1)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert not from_the_cache(function)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert not from_the_cache(function)
    assert from_the_cache(function)  # the second has not driven out the first: both are found again
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert from_the_cache(function)


def test_a_width_that_the_user_asks_for_stays() -> None:
    function, before = adding(2), sources()
    assert not from_the_cache(function, inductor={"cpp.simdlen": 0})
    assert not any("Vectorized<float>" in text for text in sources() - before)
    assert not from_the_cache(function)
    assert any("Vectorized<float>" in text for text in sources() - before)
    with config.patch({"cpp.simdlen": 0}):
        assert from_the_cache(function)


def test_each_processor_has_libraries_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    function, before = adding(3), sources()
    from_the_cache(function)
    own = sources() - before
    assert own
    assert all(processor.fingerprint() in text for text in own)
    monkeypatch.setattr(processor, "fingerprint", lambda: "another")
    from_the_cache(function)
    added = sources() - before - own
    assert added
    assert all("processor another" in text for text in added)


def test_a_library_of_ours_names_its_processor() -> None:
    before = sources()
    assert native.build("registers.h", "linear_rows.cpp") is not None
    (added,) = sources() - before
    assert processor.fingerprint() in added


def test_the_name_of_a_processor_is_the_same_each_time() -> None:
    first = processor.fingerprint()
    processor.fingerprint.cache_clear()
    assert processor.fingerprint() == first
    assert len(first) == 16
