"""Measure cases whose arms are kernels on raw tensors: rate tables that the planner reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.case import Row, Settings, Watch
from bench.clocks import timer_for
from bench.manifest import scrub
from bench.numerics import max_error
from bench.peers import release
from bench.rounds import interleave
from bench.stats import Spread, ratios


@dataclass(frozen=True)
class Kernel:
    """Hold one way to compute a row.

    `flops` counts the work it does (visited pairs), not the work that was asked for; `build` makes the call and may
    compile.
    """

    build: Callable[[], Callable[[], Tensor]]
    flops: float
    told: Mapping[str, Any] = field(default_factory=dict)


def measure(
    row: Row,
    kernels: Mapping[str, Kernel | str],
    settings: Settings,
    watch: Watch,
    *,
    useful_flops: float,
    useful_bytes: float = 0.0,
    steps: int = 1,
) -> dict[str, Any]:
    """Measure the kernels of a row; one that is given as text is left out for that reason.

    Each arm gets seconds, `gflops` on what it visits, `useful_gflops` on what the row asks for, the share of this
    machine's GEMM rate, and its largest difference from the first kernel; where `useful_bytes` says what has to be read
    from memory, `times_copy` is how many times longer it takes than copying that many bytes at the rate of this machine.
    Where a call of an arm is several `steps` one after the other, as those of a decode loop are, seconds are of one step,
    and so are the flops and bytes that are given.
    """
    torch.set_num_threads(settings.threads)
    release()
    load = [os.getloadavg()[0]]
    arms: dict[str, Any] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    reference: Tensor | None = None
    with torch.no_grad():
        for name, kernel in kernels.items():
            if isinstance(kernel, str):
                arms[name] = {"skipped": kernel}
                continue
            watch.say(name)
            try:
                call = kernel.build()
                output = call().float().cpu()
            except Exception as error:
                arms[name] = {"error": scrub(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")}
                continue
            reference = output if reference is None else reference
            calls[name] = call
            arms[name] = {**kernel.told, "max_error": float(f"{max_error(output, reference):.3g}")}
        del reference
        yardsticks = {"gemm": gemm(str(row.parameters["dtype"]), settings.device)}
        if useful_bytes:
            yardsticks["copy"] = copying(settings.device)
        spreads = interleave(
            {**calls, **yardsticks},
            timer_for(settings.device),
            settings.rounds,
            warmup=settings.warmup,
            settle=0.005,
            tick=watch.tick,
        )
    gemm_rate = GEMM_FLOPS / spreads.pop("gemm").median
    copy_rate = COPY_BYTES / spreads.pop("copy").median if useful_bytes else 0.0
    spreads = {name: spread.scaled(1 / steps) for name, spread in spreads.items()}
    for name, spread in spreads.items():
        kernel = kernels[name]
        assert isinstance(kernel, Kernel)
        arms[name] = {
            "seconds": spread.to_json(),
            **_rates(spread, kernel.flops, useful_flops, gemm_rate),
            **({"times_copy": float(f"{spread.median * copy_rate / useful_bytes:.4g}")} if useful_bytes else {}),
            **arms[name],
        }
    release()
    load.append(os.getloadavg()[0])
    return {
        "id": row.id,
        "parameters": dict(row.parameters),
        "rounds": settings.rounds,
        "warmup": settings.warmup,
        "load": [round(value, 2) for value in load],
        "gemm_gflops": float(f"{gemm_rate / 1e9:.5g}"),
        **({"copy_gb": float(f"{copy_rate / 1e9:.4g}"), "useful_bytes": round(useful_bytes)} if useful_bytes else {}),
        "arms": {name: arms[name] for name in kernels},
        "ratios": ratios(spreads, list(spreads)[:1], [name for name in ("eff",) if name in spreads]),
    }


def _rates(spread: Spread, flops: float, useful: float, gemm_rate: float) -> dict[str, float]:
    rate = flops / spread.median
    return {
        "gflops": float(f"{rate / 1e9:.5g}"),
        "useful_gflops": float(f"{useful / spread.median / 1e9:.5g}"),
        "share_of_gemm": float(f"{rate / gemm_rate:.4g}"),
    }


_EDGE = 1024
GEMM_FLOPS = 2.0 * _EDGE**3


def gemm(dtype: str, device: str) -> Callable[[], Tensor]:
    """Return a square matrix product of `GEMM_FLOPS` FLOP, the yardstick of the row."""
    left, right = (torch.ones(_EDGE, _EDGE, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    return lambda: left @ right


COPY_BYTES = 2.0 * 2**27  # read and written, beyond the reach of a cache


def copying(device: str) -> Callable[[], Tensor]:
    """Return a copy that moves `COPY_BYTES`, the yardstick of what waits for memory."""
    source, target = (torch.ones(2**25, dtype=torch.float32, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def seeded(shape: tuple[int, ...], dtype: str, device: str, seed: int) -> Tensor:
    """Draw seeded standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(
        device=device, dtype=getattr(torch, dtype)
    )
