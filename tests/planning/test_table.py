"""Walk the measured tables: in no row may the planner choose a kernel that was measured slower than another it could choose."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases.attention_table import MASKS, AttentionTable, predicate_of
from bench.condense import tables
from bench.run import RESULTS
from effcompile.compiler import all_kernels
from effcompile.core.kernel import Supported
from effcompile.core.mask import Mask
from effcompile.core.policy import Kernels
from effcompile.core.site import AttentionSite
from effcompile.core.target import Target
from effcompile.lowering.linear import GAIN
from effcompile.lowering.rates import family, rates_of
from effcompile.planning.planner import KERNEL, Circumstances, make_plan, source_kernel
from effcompile.targets import cpu

TARGETS = {
    "intel-x86-64-amx+bf16": Target(cpu.model(cpu.AMX, cores=2, clock=2.6e9, vendor="intel")),
    "intel-x86-64-avx512": Target(cpu.model(cpu.AVX512_VNNI, cores=2, clock=2.5e9, vendor="intel")),
    "amd-x86-64-avx512+bf16": Target(cpu.model(cpu.AVX512_BF16_NARROW, cores=2, clock=2.6e9, vendor="amd")),
}
NOISE = 1.05
BETWEEN_RUNS = 1.1  # where arms of a row come from two runs, and the machine's GEMM rate relates them
# Documents, and how many positions are real, are data: a plan is made before they are known, for a share that is assumed.
DATA = ("padding", "causal-padding", "documents")
STORED = {(name, document["machine"]): document for name, document in tables((), RESULTS)}
MEASURED = sorted(
    {
        (machine, row["parameters"]["dtype"])
        for (name, machine), document in STORED.items()
        for row in document["rows"]
        if name == "attention-table"
    }
)


def site_of(at: dict[str, Any], idiom: str) -> AttentionSite:
    predicate, _ = predicate_of(str(at["mask"]), 1, 2, AttentionTable().window, "cpu")
    full = at["mask"] in ("full", "decode")
    return AttentionSite(
        "a",
        "attention",
        "forward",
        "",
        idiom,
        batch=at["batch"],
        heads=at["heads"],
        kv_heads=at["kv_heads"],
        head_dim=at["head_dim"],
        value_dim=at["head_dim"],
        q_len=1 if str(at["mask"]).startswith("decode") else at["length"],
        kv_len=at["length"],
        mask=Mask() if full else Mask(keep=predicate, empty_row="zero" if idiom == "sdpa" else "never"),
        dtype=at["dtype"],
    )


def seconds_of(arm: dict[str, Any], row: dict[str, Any]) -> float:
    """Return an arm's time; that of an arm added later is scaled by how fast the machine's GEMM was then and in the row's run."""
    return float(arm["seconds"]["median"]) * arm["gflops"] / arm["share_of_gemm"] / float(row["gemm_gflops"])


@pytest.mark.parametrize(("name", "machine"), STORED)
def test_a_table_is_of_one_family(name: str, machine: str) -> None:
    assert family(TARGETS[machine].device) == machine
    assert {run["cpu"].get("family", machine) for run in STORED[name, machine]["runs"].values()} == {machine}


@pytest.mark.parametrize("idiom", ["sdpa", "matmul-softmax-matmul"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("machine", "dtype"), MEASURED)
def test_the_chosen_kernel_is_as_fast_as_any(machine: str, mask: str, idiom: str, dtype: str) -> None:
    target = TARGETS[machine]
    wrong, seen = [], 0
    for row in STORED["attention-table", machine]["rows"]:
        at = row["parameters"]
        if (at["mask"], at["dtype"]) != (mask, dtype):
            continue
        site = site_of(at, idiom)
        seconds = {name: seconds_of(arm, row) for name, arm in row["arms"].items() if "seconds" in arm}
        noise = BETWEEN_RUNS if any("run" in arm for arm in row["arms"].values()) else NOISE
        known = {
            kernel.name: seconds[kernel.name]
            for kernel in all_kernels()
            if kernel.name in seconds and isinstance(kernel.supports(site, target), Supported)
        }
        if not known:
            continue
        kernels = Kernels(tuple(kernel for kernel in all_kernels() if kernel.name in known))
        plan = make_plan((site,), (), Circumstances(target, kernels), ())
        (choice,) = [c for c in plan.choices if c.family == KERNEL]
        assert choice.tag == "measured", row["id"]
        seen += 1
        limits = {"the source's own": known.get(source_kernel(site), 1e9)}
        if mask not in DATA:
            limits["another"] = min(known.values())
        wrong += [
            f"{row['id']}: {choice.policy} is slower than {name}: {known}"
            for name, limit in limits.items()
            if known[choice.policy] > noise * limit
        ]
    assert seen >= 6
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("machine", [machine for name, machine in STORED if name == "linear-table"])
def test_linear_layers_are_chosen_where_they_gain(machine: str) -> None:
    rates = rates_of(TARGETS[machine].device)
    assert rates is not None
    chosen = set()
    for row in STORED["linear-table", machine]["rows"]:
        at = row["parameters"]
        gain = rates.linear_gain(at["length"], at["in"], at["out"], at["dtype"])
        assert gain is not None
        ours, torchs = (row["arms"][name]["seconds"]["median"] for name in ("eff-linear", "aten"))
        assert ours <= torchs if gain >= GAIN else torchs <= NOISE * 1.01 * ours, row["id"]
        chosen.add(gain >= GAIN)
    assert chosen == {True, False}
