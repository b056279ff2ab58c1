"""Edit data without inverting it: the denoising consistent model (InfEdit, arXiv:2312.04965).

At each level the source is the data with fresh noise, so what the denoiser gets wrong about it is known exactly, and is taken
from the target's prediction. No inversion has to be stored or can be off: where target and source are asked the same, the data
comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effcompile.core.errors import EffError
from effcompile.core.schedule import Schedule
from effcompile.runtime.processes import DiffusionProcess
from effcompile.runtime.trajectory import Generators, Trajectory, draw


@torch.no_grad()
def edit_latents(
    denoiser: Callable[..., Tensor],
    schedule: Schedule,
    process: DiffusionProcess,
    data: Tensor,
    source: Sequence[Any],
    target: Sequence[Any],
    *,
    layout: Sequence[Any] | None = None,
    generator: Generators = None,
    time_scale: float = 1.0,
) -> Tensor:
    """Return data `[B, C, *size]` changed from what `source` says of it to what `target` says.

    Each step is one call of 3 B rows, source, layout and target in this order, so that a denoiser whose attention is controlled
    can hand maps from one to the next. The layout branch is edited like the target; where it is not given it is asked what the
    target is.

    Args:
        denoiser: called as in `eff.sampler`, with the positional arguments of the three branches joined.
        schedule: of one stage without a cache; its first level is how far the target may leave the source.
        process: what the answers mean.
        data: of the stage's size.
        source, target, layout: positional arguments of the denoiser, tensors with B rows or values that all branches share.
        generator: draws the noise of each level, the same for all branches.
        time_scale: as in `eff.sampler`.

    Raises:
        EffError: EFF-D113 for a schedule of several stages or with a cache; EFF-D107 for data or answers of another shape, and for
            numbers that are not finite.
    """
    if len(schedule.stages) > 1 or schedule.caching is not None:
        raise EffError(
            "EFF-D113", "editing walks along one stage and computes every step", hint="schedule=plain, no cache"
        )
    (stage,) = schedule.stages
    if tuple(data.shape[2:]) != stage.size:
        raise EffError("EFF-D107", f"data {list(data.shape)} for a stage of {list(stage.size)}")
    rows, steps = data.shape[0], Trajectory(schedule, process).steps
    joined = [_joined(parts) for parts in zip(source, target if layout is None else layout, target, strict=True)]
    noise = draw(tuple(data.shape), generator, data)
    noisy = process.noised(data, noise, steps[0].level).to(data.dtype)
    branches = [noisy, noisy, noisy]
    found = data
    for step in steps:
        level = torch.tensor(step.level, dtype=torch.float32, device=data.device)
        time = (level if time_scale == 1 else level * time_scale).expand(3 * rows)
        x = torch.cat(branches)
        out = denoiser(x, time, *joined)
        if out.shape != x.shape:
            raise EffError(
                "EFF-D107", f"step {step.number}: latents {list(x.shape)}, the denoiser's answer {list(out.shape)}"
            )
        # What each branch takes for its data; the source's is wrong by a difference that is known.
        told, laid, made = process.step(x, out, step.level, stage.end).split(rows)
        laid, found = (data + (part - told) for part in (laid, made))
        if step.last:
            break
        noise = draw(tuple(data.shape), generator, data)
        branches = [process.noised(part, noise, step.after).to(data.dtype) for part in (data, laid, found)]
    if not bool(torch.isfinite(found).all()):
        raise EffError("EFF-D107", "the edited data has numbers that are not finite; nothing was returned")
    return found


def _joined(parts: Sequence[Any]) -> Any:
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else parts[0]
