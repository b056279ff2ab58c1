"""Run one call of the matrix, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.hf_zoo.matrix import Call, MatrixCase, outputs


def run_call(
    module: nn.Module | Callable[..., Any],
    case: MatrixCase,
    call: Call,
    batch: int | None = None,
    length: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Call `module` as `call` says, without gradients, and return its outputs by name.

    Args:
        module: what `case.build()` gave, or that through `torch.compile`.
        case: where the call comes from.
        call: one of `case.calls`.
        batch: sequences; the call's own number when absent.
        length: positions; the call's own number when absent.
        seed: of the inputs. Equal arguments give equal inputs, whatever module runs them.

    Returns:
        Tensors by name. Of a decoding call `prefill.NAME`, then `step0.NAME`, `step1.NAME`, ...; every run has a fresh
        cache, handed over by keyword.
    """
    assert call in case.calls, f"{call.name} is not a call of {case.name}"
    batch, length = batch or call.batch, length or call.length
    with torch.no_grad():
        if call.decode is None:
            return outputs(module(**call.make(batch, length, seed)))
        return _decode(module, call, batch, length, seed)


def _decode(module: Any, call: Call, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    assert call.decode is not None
    steps = call.decode.steps(batch, length, seed)
    cache = call.decode.cache(module.config, batch, length + len(steps))
    result = module(**call.make(batch, length, seed), past_key_values=cache, use_cache=True)
    carried = call.decode.carry(result) if call.decode.carry else {}
    found = {f"prefill.{name}": tensor for name, tensor in outputs(result).items()}
    for index, step in enumerate(steps):
        result = module(**step, **carried, past_key_values=cache, use_cache=True)
        found.update({f"step{index}.{name}": tensor for name, tensor in outputs(result).items()})
    return found
