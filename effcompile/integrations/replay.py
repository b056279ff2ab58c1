"""Make the graphs of a denoiser whose attention is replayed from earlier steps, through `torch.export`: one a phase and shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from effcompile import ops
from effcompile.capture.export import capture_export
from effcompile.codegen.emit import emit_graph
from effcompile.compiler import all_methods, compile_program
from effcompile.core.dump import Dump
from effcompile.core.errors import ContractError, EffError
from effcompile.core.options import Options
from effcompile.core.policy import read_policy
from effcompile.core.program import Input, Program
from effcompile.core.site import AttentionSite
from effcompile.passes.attention.re_ttention import Phase, ReTtention
from effcompile.passes.attention.replay import Residual, replay
from effcompile.passes.recognize.attention import Recognized
from effcompile.passes.unread_rows import DropUnreadRows
from effcompile.runtime.replayed import Graph, Phases, ReplayedDenoiser
from effcompile.targets.detect import detect, free_memory


def replayed(denoiser: Any, policy: str | ReTtention, *, emit: str = "inductor") -> ReplayedDenoiser:
    """Return a denoiser that attends as the policy says; its arguments are positional tensors, `(latent, time, ...)`.

    Raises:
        EffError: EFF-D112 where it is no module, or for another policy. A shape of which no attention can be replayed raises it at
            the first call, with the reason of each site (exit code 3), and EFF-D115 where its state is larger than free memory.
    """
    if isinstance(policy, str):
        found = read_policy("attention", policy, all_methods())
    else:
        found = policy
    if not isinstance(found, ReTtention):
        raise EffError("EFF-D112", f"`{found.spelled}` carries no state", hint='options={"attention": ...}')
    if not isinstance(denoiser, nn.Module):
        raise EffError(
            "EFF-D112", "attention is replayed in a module; this denoiser is a function, or was compiled already"
        )
    return ReplayedDenoiser(found.phase, lambda args: _phases(denoiser, found, args, emit))


def _phases(denoiser: nn.Module, policy: ReTtention, args: tuple[Any, ...], emit: str) -> Phases:
    if policy.keep >= 1:  # everything is kept: the module itself, bit for bit
        return Phases({"dense": lambda state, given: denoiser(*given)}, {})
    ops.register()
    copied = tuple(x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x for x in args)
    with torch.no_grad():
        program = capture_export(torch.export.export(denoiser, copied, strict=False))
        state: dict[str, Tensor] = {}
        # What is replayed needs a row for every key, so the last layer keeps those that nobody reads.
        options = Options(strict=True, emit=emit, disable=(DropUnreadRows.name,))
        made = {phase: _graph(program, policy, phase, copied, state, options) for phase in get_args(Phase)}
    return Phases(made, state)


def _graph(
    program: Program,
    policy: ReTtention,
    phase: Phase,
    args: tuple[Any, ...],
    state: dict[str, Tensor],
    options: Options,
) -> Graph:
    """Return the graph of a phase; state that it carries and that is not there yet is made, where there is memory for it."""

    def storing(found: Recognized) -> Any:
        changed, residuals = replay(found.program, replayable(found, policy), policy, phase)
        _make_state(state, residuals, torch.device(program.device))
        left = found.sites if phase == "dense" else tuple(site for site in found.sites if site.id not in residuals)
        return replace(found, program=changed, sites=left), (), ()

    compiled = compile_program(program, detect(program.device), options, Dump(None), storing=storing)
    (entry,) = compiled.program.entries
    names = tuple(entry.inputs)
    run = emit_graph(entry.graph, _arguments(names, state, args), options)

    def call(held: Mapping[str, Tensor], given: tuple[Any, ...]) -> Tensor:
        answer: Tensor = run(*_arguments(names, held, given))[0]
        return answer

    return call


def replayable(found: Recognized, policy: ReTtention) -> tuple[AttentionSite, ...]:
    """Return the sites that the policy takes.

    Raises:
        ContractError: EFF-D112 where there is none, with the reason of each.
    """
    refusals = {site.id: policy.refuses(site) for site in found.sites}
    taken = tuple(site for site in found.sites if refusals[site.id] is None)
    if not taken:
        why = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items()) or "no attention was found"
        raise ContractError("EFF-D112", f"no attention can be replayed: {why}")
    return taken


def _make_state(state: dict[str, Tensor], residuals: Mapping[str, Residual], device: torch.device) -> None:
    """Add what sites carry.

    Raises:
        ContractError: EFF-D115 where it would take more memory than is free.
    """
    fresh = [one for one in residuals.values() if f"{one.site}.rho" not in state]
    needed, free = sum(one.nbytes for one in fresh), free_memory(device.type)
    if free is not None and needed > free:
        raise ContractError(
            "EFF-D115",
            f"what {len(fresh)} layers carry from step to step takes {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free",
            hint="re-ttention{dense_layers=N} leaves the first N layers out; or a smaller batch",
        )
    for one in fresh:
        state.update(one.state(device))


def _arguments(names: tuple[Input, ...], state: Mapping[str, Tensor], args: tuple[Any, ...]) -> list[Any]:
    # Graphs have the strides of the example: a time that was expanded over the batch has others.
    given = iter([x.contiguous() for x in args if isinstance(x, Tensor)])
    found = []
    for item in names:
        if item.kind == "packed":
            found.append(state[item.name])
        elif item.value is not None:
            found.append(item.value)
        else:
            found.append(next(given))
    return found
