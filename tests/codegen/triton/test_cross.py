"""Check the binaries of every kernel for every GPU, none of which is here.

The quick tests check the recorded table (tests/support/resources.py) and compile a few lines of it anew; the whole set is slow.
"""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from effcompile.codegen.triton import cross, kernel, kernels
from effcompile.core.errors import EffError
from effcompile.core.target import Target
from effcompile.targets import devices
from tests.support import resources

AGAIN = ("flash/bf16-d128-right/sm_90", "flash/bf16-d72/sm_80", "flash/bf16-d64-right/gfx942")
"""What the quick tests compile: about two seconds each, once per Triton cache."""


@pytest.fixture(scope="module")
def table() -> dict[str, dict]:
    """Return the recorded lines."""
    return resources.load()["binaries"]


def test_every_kernel_has_its_lines(table: dict[str, dict]) -> None:
    wanted = resources.catalog()
    assert sorted(table) == sorted(wanted), "python -m tests.support.resources --accept --changed"
    stale = [key for key, (_, _, config, _) in wanted.items() if table[key]["config"] != config.name]
    assert stale == []


def test_the_lines_are_of_these_sources() -> None:
    recorded = resources.load()["sources"]
    assert {one.name: resources.digest(one) for one in kernels()} == recorded, (
        "a kernel changed: python -m tests.support.resources --accept --changed, and raise the version of its op where the "
        "meaning changed"
    )


def check(key: str, line: dict) -> None:
    """Check what holds for every default binary: no spills, and it fits."""
    arch = key.rpartition("/")[2]
    device = Target.parse(arch, devices()).device
    assert line["spills"] == 0, key
    assert line["shared"] <= device.cache_bytes, key
    if device.kind == "cuda":
        assert line["registers"] * line["threads"] <= 65536, key


def agree(key: str, line: dict, table: dict[str, dict]) -> None:
    """Compare with the record, where it is of this Triton.

    LLVM's AMD backend does not always break ties alike: one of these lines was seen with two texts that use the same
    registers, memory and instructions. So the text itself counts on NVIDIA only.
    """
    if cross.version() != resources.load()["triton"]:
        return
    left_out = {"digest"} if "/gfx" in key else set()
    assert {k: v for k, v in line.items() if k not in left_out} == {
        k: v for k, v in table[key].items() if k not in left_out
    }


def test_no_default_config_spills_and_all_fit(table: dict[str, dict]) -> None:
    for key, line in table.items():
        check(key, line)


def test_matrix_units_are_used(table: dict[str, dict]) -> None:
    """16-bit attention and experts run on the widest unit of their chip: wgmma on Hopper, tcgen05 on data-center Blackwell.

    Those units take 64 rows or more; blocks of 16 rows run on the older one.
    """
    unit = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma", "gfx950": "mfma"}
    for key, line in table.items():
        name, form, arch = key.split("/")
        kind = unit.get(arch, "mma")
        wide = name in ("flash", "block_sparse") or (name in ("moe_first", "moe_second") and "-m16" not in form)
        if wide and not form.startswith("fp32"):
            assert line["matrix"] == [kind], key
        elif name in ("moe_first", "moe_second") and not form.startswith("fp32"):
            assert line["matrix"] == ["mfma" if arch.startswith("gfx") else "mma"], key


@pytest.mark.parametrize("key", AGAIN)
def test_a_few_lines_compiled_anew(key: str, table: dict[str, dict]) -> None:
    line = resources.line(key)
    check(key, line)
    agree(key, line, table)


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(resources.catalog()))
def test_every_line_compiled_anew(key: str, table: dict[str, dict]) -> None:
    line = resources.line(key)
    check(key, line)
    agree(key, line, table)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_configs_that_are_not_the_default_compile(arch: str) -> None:
    for one in kernels():
        form = one.forms(arch)[0]
        for config in one.configs(form, arch)[1:]:
            binary = cross.cross_compile(one, form, config, arch)
            assert binary.shared <= Target.parse(arch, devices()).device.cache_bytes
            assert binary.copies == ("tma" if config.descriptors else "plain")


@pytest.mark.parametrize("one", kernels(), ids=lambda one: one.name)
def test_sizes_of_one_compile(one: kernel.Kernel) -> None:
    """Triton makes a constant of every integer argument that is 1: one head, one query, one page."""
    for form in one.forms("sm_90"):
        config = one.configs(form, "sm_90")[0]
        cross.front_end(one, form, config, "sm_90", ones=tuple(name for name, kind in form.types if kind == "i32"))


@pytest.mark.slow
@pytest.mark.parametrize("one", kernels(), ids=lambda one: one.name)
def test_each_size_of_one_compiles(one: kernel.Kernel) -> None:
    form = one.forms("sm_90")[0]
    config = one.configs(form, "sm_90")[0]
    for name in (name for name, kind in form.types if kind == "i32"):
        cross.front_end(one, form, config, "sm_90", ones=(name,))


def test_a_relative_is_tuned_like_its_family() -> None:
    assert [kernel.architecture(word) for word in ("sm_86", "sm_103", "sm_90")] == ["sm_89", "sm_100", "sm_90"]
    with pytest.raises(EffError, match="EFF-K101"):
        kernel.architecture("sm_75")


def test_a_declaration_that_misses_a_parameter_is_our_fault() -> None:
    one = kernels()[0]
    form = one.forms("sm_90")[0]
    short = dataclasses.replace(form, types=form.types[1:])
    with pytest.raises(ValueError, match="disagree about"):
        cross.signature(one, short, one.configs(form, "sm_90")[0])


def test_what_does_not_compile_says_why() -> None:
    one = kernels()[0]
    form = one.forms("sm_90")[0]
    config = dataclasses.replace(one.configs(form, "sm_90")[0], warps=3)
    with pytest.raises(EffError, match=r"EFF-K102.*power of 2"):
        cross.cross_compile(one, form, config, "sm_90")


@pytest.mark.parametrize(
    ("width", "cut"),
    [(64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (128, (128, 0)), (192, (128, 64)), (256, (256, 0))],
)
def test_head_dimensions_are_cut(width: int, cut: tuple[int, int]) -> None:
    assert kernel.pieces(width) == cut


def test_every_head_dimension_is_covered() -> None:
    for width in range(1, 257):
        first, second = kernel.pieces(width)
        assert width <= first + second < 2 * max(width, 16)
        assert all(n in (0, 16, 32, 64, 128, 256) for n in (first, second))
        assert first > second
