"""Say what happens to each class whose experts no graph can show; docs/experts.md has the same as a table."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from effcompile.core.site import Refusal
from effcompile.integrations.experts import dbrx, jetmoe, listed, llama4, longcat, step3p7, switch

REPLACED: dict[str, Callable[[nn.Module], Refusal | None]] = {
    dbrx.CLASS: dbrx.prepare,
    jetmoe.CLASS: jetmoe.prepare,
    jetmoe.ATTENTION: jetmoe.prepare_attention,
    llama4.CLASS: llama4.prepare,
    longcat.CLASS: longcat.prepare,
    step3p7.CLASS: step3p7.prepare,
    switch.CLASS: switch.prepare,
}
"""Classes of transformers by name; each prepares a module or says why not."""

REFUSED = {
    "NllbMoeSparseMLP": "its loop takes a 0/1 mask for the numbers of experts, so that all but two never run",
    "VitPoseBackboneMoeMLP": "an image, not a token, chooses its expert, and all experts run in one graph already",
}
"""Classes of transformers that are left alone, and why."""


def replacement(module: nn.Module) -> Callable[[nn.Module], Refusal | None] | None:
    """Return what prepares a module of a known class, or a block with a list of experts; None where nothing does."""
    kind = type(module)
    if kind.__name__ in REPLACED and kind.__module__.startswith("transformers."):
        return REPLACED[kind.__name__]
    if kind.__name__ in REFUSED and kind.__module__.startswith("transformers."):
        return lambda _: Refusal("EFF-M302", f"{kind.__name__}: {REFUSED[kind.__name__]}")
    return listed.prepare if listed.has_list(module) else None
