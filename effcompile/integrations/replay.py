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
from effcompile.passes.attention.re_ttention import Phase, ReTtention
from effcompile.passes.attention.replay import Residual, replay
from effcompile.passes.recognize.attention import Recognized
from effcompile.runtime.replayed import Graph, Phases, ReplayedDenoiser
from effcompile.targets.detect import detect


def replayed(denoiser: Any, policy: str | ReTtention, *, emit: str = "inductor") -> ReplayedDenoiser:
    """Return a denoiser that attends as the policy says; its arguments are positional tensors, `(latent, time, ...)`.

    Raises:
        EffError: EFF-D112 where it is no module, or for another policy. A shape of which no attention can be replayed raises it at
            the first call, with the reason of each site (exit code 3).
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
        made: dict[str, Graph] = {}
        state: dict[str, Tensor] = {}
        for phase in get_args(Phase):
            made[phase], carried = _graph(program, policy, phase, copied, Options(strict=True, emit=emit))
            for one in carried.values():
                fresh = one.state(torch.device(program.device))
                state.update({name: x for name, x in fresh.items() if name not in state})
    return Phases(made, state)


def _graph(
    program: Program, policy: ReTtention, phase: Phase, args: tuple[Any, ...], options: Options
) -> tuple[Graph, Mapping[str, Residual]]:
    carried: dict[str, Residual] = {}

    def storing(found: Recognized) -> Any:
        refusals = {site.id: policy.refuses(site) for site in found.sites}
        taken = [site for site in found.sites if refusals[site.id] is None]
        if not taken:
            why = "; ".join(f"{name}: {refusal}" for name, refusal in refusals.items()) or "no attention was found"
            raise ContractError("EFF-D112", f"no attention can be replayed: {why}")
        changed, residuals = replay(found.program, taken, policy, phase)
        carried.update(residuals)
        left = found.sites if phase == "dense" else tuple(site for site in found.sites if site.id not in residuals)
        return replace(found, program=changed, sites=left), (), ()

    compiled = compile_program(program, detect(program.device), options, Dump(None), storing=storing)
    (entry,) = compiled.program.entries
    names = tuple(entry.inputs)
    example = {name: x for one in carried.values() for name, x in one.state(torch.device(program.device)).items()}
    run = emit_graph(entry.graph, _arguments(names, example, args), options)

    def call(state: Mapping[str, Tensor], given: tuple[Any, ...]) -> Tensor:
        answer: Tensor = run(*_arguments(names, state, given))[0]
        return answer

    return call, carried


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
