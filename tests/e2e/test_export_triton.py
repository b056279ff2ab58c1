"""Binaries of Triton kernels for GPUs that are not here: what a model launches, and the catalog."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import effcompile as eff
from effcompile.cli.models import load_model
from effcompile.codegen.triton import load, pool
from effcompile.core.errors import EffError

pytest.importorskip("triton")


class Head(nn.Module):
    """One causal attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over `[B, S, 1024]`."""
        q = x.unflatten(-1, (16, 64)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


X = torch.zeros(2, 32768, 1024, dtype=torch.bfloat16)  # nothing of it is read: the kernels are compiled, not run


def test_the_kernels_of_a_plan_with_their_launches(tmp_path: Path) -> None:
    policy = {"attention": "block-topk{density=0.1,block=128,dense_layers=0}"}
    made = eff.export(Head().eval(), (X,), to="triton", target=["sm_90", "gfx942"], out=tmp_path / "a", options=policy)
    facts = json.loads((tmp_path / "a" / "kernels.json").read_text())
    assert {row["compute"] for row in facts["kernels"]} == {"sm_90", "gfx942"}
    assert sorted(facts["launches"]) == ["gfx942", "sm_90"]
    names = {row["name"] for row in facts["kernels"]}
    for launches in facts["launches"].values():
        assert {each["kernel"] for each in launches} <= names
        assert any("s" in size and size.strip("0123456789") for each in launches for size in each["grid"]), "grids vary"
    for row in facts["kernels"]:
        code = (tmp_path / "a" / row["code"]).read_bytes()
        assert code[:4] == b"\x7fELF"
        assert row["spills"] == 0
        assert row["parameters"] >= len(row["arguments"])
        assert row["symbol"] in (tmp_path / "a" / row["text"]).read_text()
    assert any(site.form.startswith("block-topk") or site.form == "triton-blocks" for site in made.sites)
    with pytest.raises(EffError, match="EFF-E107"):
        eff.load(tmp_path / "a")
    library = eff.load(tmp_path / "a", trust=True)
    with pytest.raises(EffError, match="EFF-E112"):
        library({})
    if not torch.cuda.is_available():  # the loader of the artifact alone, without this package
        program = "import load; load.Library('.').kernel(load.Library('.').names()[0], 'sm_90')"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path / "a", capture_output=True, text=True, check=False
        )
        assert "EFF-E156" in done.stderr


@pytest.mark.slow
def test_the_kernels_of_a_mixture(tmp_path: Path) -> None:
    given = load_model("zoo:mixtral-tiny-gathered", {"batch": 2, "seq": 16}, torch.bfloat16, real=True)
    options = {"moe": "block-aligned"}
    eff.export(given.model, given.args, given.kwargs, to="triton", target="sm_90", out=tmp_path / "a", options=options)
    facts = json.loads((tmp_path / "a" / "kernels.json").read_text())
    assert {"moe_first", "moe_second", "moe_combine"} <= {row["kernel"] for row in facts["kernels"]}


def test_a_kernel_of_the_catalog_and_its_header(tmp_path: Path) -> None:
    made = eff.export("kernels:decode_merge", to="triton", target="sm_80,gfx950", out=tmp_path / "a")
    assert made.plan_hash == ""
    assert "eff_kernel" in (tmp_path / "a" / "kernels.h").read_text()
    assert "def " in (tmp_path / "a" / "source" / "decode_merge.py").read_text()
    program = '#include "kernels.h"\nint main(void) { return eff_kernels_count == 4 ? 0 : 1; }'
    (tmp_path / "main.c").write_text(program)
    done = subprocess.run(["cc", "-I", tmp_path / "a", tmp_path / "main.c", "-o", tmp_path / "main"], check=False)
    assert done.returncode == 0
    assert subprocess.run([tmp_path / "main"], check=False).returncode == 0


@pytest.mark.parametrize(
    ("model", "target", "code"),
    [
        ("kernels:flush", "sm_80", "EFF-E152"),
        ("kernels:all", "sm_75", "EFF-E152"),
        ("kernels:all", "cpu", "EFF-E152"),
        ("kernels:all", None, "EFF-E151"),
        ("zoo:llama-tiny", "sm_80", "EFF-E151"),
    ],
)
def test_what_is_refused(model: str, target: str | None, code: str, tmp_path: Path) -> None:
    with pytest.raises(EffError, match=code):
        eff.export(model, to="triton", target=target, out=tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_a_kernel_says_what_it_runs_on(tmp_path: Path) -> None:
    with pytest.raises(EffError, match=r"EFF-E152 .*uses no Triton kernel; its sites run on sdpa"):
        eff.export(Head().eval(), (X,), to="triton", target="sm_90", out=tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("import os; os.abort()", "EFF-E154"),
        ("import time; input(); time.sleep(60)", "EFF-E155"),
        ("import sys; sys.exit('no compiler')", "EFF-E154 .*no compiler"),
    ],
)
def test_a_compiler_that_dies(program: str, code: str) -> None:
    jobs = [{"kernel": "flash", "compute": "sm_90"}] * 3
    with pytest.raises(EffError, match=code):
        pool.compile_all(jobs, 2.0, command=(sys.executable, "-c", program))


def test_the_loader_checks_its_arguments() -> None:
    facts = {
        "arguments": [{"name": "q", "type": "*bf16", "aligned": True}, {"name": "n", "type": "i32", "aligned": False}]
    }
    kernel = load.Kernel(None, None, {**facts, "parameters": 4, "threads": 128, "shared": 0})
    with pytest.raises(load.LoadError, match=r"EFF-E157 1 arguments given, 2 wanted: q, n"):
        kernel.launch((1,), [16])
    with pytest.raises(load.LoadError, match=r"EFF-E157 `q` lies at 0x8"):
        kernel.launch((1,), [8, 3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_binary_on_its_gpu(tmp_path: Path) -> None:
    """Launch `key_sums`' neighbour `pool` through the driver alone and compare with the op."""
    from effcompile.codegen.triton.launch import architecture_of

    word = architecture_of(torch.zeros(1, device="cuda"))
    eff.export("kernels:decode_merge", to="triton", target=word, out=tmp_path / "a")
    library = load.Library(tmp_path / "a")
    assert library.kernel(library.names()[0]).facts["compute"] == word
