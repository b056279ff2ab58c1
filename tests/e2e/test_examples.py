"""Run the examples the way a reader does, and the out-of-tree package through a real entry point."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import effcompile as eff
from effcompile import compiler, discover
from effcompile.core.options import Options

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
OWN = EXAMPLES / "own_pass"


def run(path: str, *words: str, site: Path | None = None) -> str:
    """Run an example as a process of its own and return what it printed."""
    searched = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": searched}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / path), *words], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def install(site: Path) -> Path:
    """Write what pip writes: the package (by path) and its metadata with the entry points of its pyproject."""
    project = tomllib.loads((OWN / "pyproject.toml").read_text())["project"]
    info = site / "eff_example-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (site / "eff_example").symlink_to(OWN / "eff_example")
    return site


@pytest.fixture
def imported() -> Iterator[None]:
    """Make `eff_example` importable in this process, without its entry point."""
    sys.path.insert(0, str(OWN))
    discover.modules.cache_clear()
    yield
    sys.path.remove(str(OWN))
    discover.modules.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "eff_example"]:
        del sys.modules[name]
    torch._dynamo.reset()


def test_huggingface() -> None:
    pytest.importorskip("transformers")
    out = run("huggingface.py", "--quick")
    assert "3 attention sites rewritten, 0 missed" in out
    assert "causal & key-padding" in out


def test_diffusers() -> None:
    pytest.importorskip("diffusers")
    out = run("diffusers_transformer.py", "--quick")
    assert "4 attention sites rewritten, 0 missed" in out
    assert "2 x 64 keys, mask full" in out


def test_nanogpt_is_recognized_and_its_buffer_watched() -> None:
    out = run("nanogpt.py", "--quick")
    assert out.count("mask causal, kernel") == 3
    assert "after the mask buffers changed: " in out
    assert "changed: its graph runs" in out


def test_own_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    out = run("own_pass/run.py", site=install(tmp_path / "site"))
    assert "eff_example is installed" in out
    assert out.count("softcap 30.0, mask causal, kernel query-blocks") == 2
    assert "2 multiplications by one removed" in out


def example_layer() -> torch.nn.Module:
    """Return one layer of the example's model."""
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location("own_pass_run", OWN / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layer: torch.nn.Module = module.Layer()
    return layer


def test_own_pass_given_as_an_option(imported: None) -> None:
    unit_scale = importlib.import_module("eff_example.unit_scale")
    layer, x = example_layer(), torch.randn(2, 128, 64)
    options = {"passes": [unit_scale.RemoveUnitScale()], "strict": True, "emit": "interpreter"}
    fast = torch.compile(layer, backend="eff", options=options)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x), rtol=1e-5, atol=1e-5)
    (graph,) = eff.report()["graphs"]
    assert "remove-unit-scale: 1 multiplications by one removed" in graph["notes"]
    assert all(site["kernel"] != "query-blocks" for site in graph["sites"])  # no kernel without the entry point


def test_own_pass_leaves_what_it_must(imported: None) -> None:
    """A returned tensor must stay fresh, an integer becomes a float, and a scale that is not one is a scale."""
    unit_scale = importlib.import_module("eff_example.unit_scale")

    def scaled(x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * 1.0, (x * 1.5).sin(), (n * 1.0).sin(), (x * 1.0).cos()

    options = {"passes": [unit_scale.RemoveUnitScale()], "strict": True, "emit": "interpreter"}
    x, n = torch.randn(3), torch.arange(3)
    found, expected = torch.compile(scaled, backend="eff", options=options)(x, n), scaled(x, n)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert found[0].data_ptr() != x.data_ptr()
    assert "remove-unit-scale: 1 multiplications by one removed" in eff.report()["graphs"][0]["notes"]


def test_own_classes_join_the_built_in_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [item.name for item in compiler.all_passes(Options())]
    assert "remove-unit-scale" not in before
    monkeypatch.syspath_prepend(str(install(tmp_path / "site")))
    discover.modules.cache_clear()
    try:
        passes = [item.name for item in compiler.all_passes(Options())]
        kernels = [item.name for item in compiler.all_kernels()]
    finally:
        monkeypatch.undo()
        discover.modules.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "eff_example"]:
            del sys.modules[name]
    assert sorted(passes) == sorted([*before, "remove-unit-scale"])
    assert passes.index("remove-unit-scale") > passes.index("remove-identities")
    assert "query-blocks" in kernels


def test_the_small_mixture_of_experts_trains(tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    text = run("train_pydoc_moe.py", "--steps", "16", "--out", str(out))
    first, last = (float(line.split()[2]) for line in text.splitlines() if line.startswith("step "))
    assert last < first - 1, "two thousand bytes a step teach their frequencies at once"
    assert out.stat().st_size < 2_000_000


def test_a_judge_of_digits_trains(tmp_path: Path) -> None:
    out = tmp_path / "judge.safetensors"
    text = run("train_digits_dit.py", "--model", "judge-8", "--out", str(out))
    right = float(text.split("judge of 8 x 8: ")[1].split(" %")[0])
    assert right > 85
    assert out.is_file()


def test_every_example_is_listed_and_tested() -> None:
    text = (EXAMPLES / "README.md").read_text()
    tests = Path(__file__).read_text()
    found = [path for path in EXAMPLES.rglob("*.py") if "eff_example" not in path.parts]
    assert len(found) == 6
    for path in found:
        name = str(path.relative_to(EXAMPLES))
        assert f"python examples/{name}" in text
        assert f'run("{name}"' in tests
