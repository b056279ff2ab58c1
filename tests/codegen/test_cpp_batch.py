"""Check that a module's C++ kernels are compiled in one file, and one by one where that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import fresh_cache

from effcompile.codegen import cpp_batch

HEAD = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
KERNEL = 'extern "C"  void  kernel(const float* in_ptr0, float* out_ptr0)\n{\n    out_ptr0[0] = in_ptr0[0];\n}\n'


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_cache(), config.patch(compile_threads=2):
        yield
    torch._dynamo.reset()


def two(x: Tensor, w: Tensor) -> Tensor:
    """Need a kernel before and a kernel behind a product."""
    x = torch.softmax(x + 1, -1) @ w
    return torch.tanh(x)


def arguments(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(9, 16, generator=draw), torch.randn(16, 16, generator=draw)


def files() -> list[str]:
    """Return the sources of all kernels in the cache folder."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    return [path.read_text() for path in Path(cache_dir()).rglob("*.main.cpp")]


def check(options: dict[str, Any] | None = None) -> None:
    run = torch.compile(two, backend="eff", options={"strict": True, **(options or {})})
    with torch.no_grad():
        for seed in range(2):
            torch.testing.assert_close(run(*arguments(seed)), two(*arguments(seed)), rtol=1e-5, atol=1e-5)


def test_all_kernels_of_a_module_are_one_file() -> None:
    check()
    (source,) = files()
    assert source.count("namespace eff_") == source.count("static void kernel(") == 2
    torch._dynamo.reset()
    check()  # from the caches: nothing new is written
    assert files() == [source]


@pytest.mark.slow
def test_many_kernels_are_split_among_the_compile_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_batch, "_LEAST", 1)
    check()
    assert [source.count("namespace eff_") for source in files()] == [1, 1]


def test_what_does_not_compile_together_is_compiled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> list[Callable[..., Any]]:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(cpp_batch, "_compiled", broken)
    check()
    assert len(files()) == 2
    assert not any("namespace eff_" in source for source in files())


def test_without_compile_threads_torchinductor_goes_its_own_way() -> None:
    with config.patch(compile_threads=1):
        check()
    assert not any("namespace eff_" in source for source in files())


def test_torchinductor_itself_is_left_alone() -> None:
    from torch._inductor.async_compile import AsyncCompile

    before = AsyncCompile.cpp_pybinding
    check()
    assert AsyncCompile.cpp_pybinding is before
    count = len(files())
    torch._dynamo.reset()
    torch.compile(two, backend="inductor")(*arguments())
    assert len(files()) > count + 1


@pytest.mark.parametrize(
    "source",
    [
        KERNEL,
        HEAD + '#include "c10/util/Unroll.h"\n' + KERNEL,
        HEAD + "#define WIDTH 16\n" + KERNEL,
        HEAD + KERNEL + KERNEL,
        HEAD + KERNEL.replace("}", "    helper_of_kernel(kernel);\n}"),
        HEAD + 'extern "C" int helper(int x) { return x; }\n' + KERNEL,
        HEAD + KERNEL.replace("void", "int64_t"),
    ],
)
def test_a_source_with_more_than_a_function_is_not_touched(source: str) -> None:
    assert cpp_batch._split(HEAD + KERNEL) == (HEAD.strip(), KERNEL)
    assert cpp_batch._split(source) is None
