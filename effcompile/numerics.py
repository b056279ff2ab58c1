"""Run a model's graphs on real inputs, pass by pass: the error ledger, and the bisection that names a wrong pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from effcompile import skeleton as skeletons
from effcompile.backend import check_doors, target_of
from effcompile.compiler import compile_program
from effcompile.core.dump import Dump
from effcompile.core.errors import EffError
from effcompile.core.options import Options
from effcompile.core.program import Program
from effcompile.core.target import Target
from effcompile.observe import SeenGraph, observe
from effcompile.planning.ledger import Ledger, Recording, Reference, Row, execute, measure

Progress = Callable[[str], None]


@dataclass(frozen=True)
class GraphLedger:
    """Hold the ledger of one graph and the module that it belongs to."""

    owner: str
    ledger: Ledger


@dataclass(frozen=True)
class Verdict:
    """Name what makes the outputs leave tolerance.

    `culprit` is a pass, `kernels` (recognition or the kernels that replace raised ops), `emission`, `inductor`, or None
    where all is well; `fuel` the number of rewrites after which it shows; `confirmed` tells whether leaving the pass
    out mends it.
    """

    culprit: str | None
    graph: str
    fuel: int | None
    rows: tuple[Row, ...]
    confirmed: bool | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "culprit": self.culprit,
            "graph": self.graph,
            "fuel": self.fuel,
            "confirmed": self.confirmed,
            "note": self.note,
            "rows": [row.to_json() for row in self.rows],
        }


def ledger(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, Any] | None = None,
    progress: Progress = lambda text: None,
    **kwargs: Any,
) -> tuple[GraphLedger, ...]:
    """Return the error that each pass adds in each graph, by running the model for real on the device of its inputs."""
    asked = Options.parse(options)
    check_doors(asked)
    found = []
    for graph, program in _graphs(model, inputs, kwargs):
        progress(f"passes of {graph.owner or 'the model'}")
        recording = Recording(None)
        target = target_of(asked, program.device)
        compile_program(program, target, replace(asked, require=()), recording)
        found.append(GraphLedger(graph.owner, measure(_distinct(recording.stages), graph.inputs)))
    return tuple(found)


def _distinct(stages: Sequence[tuple[str, Program]]) -> list[tuple[str, Program]]:
    """Leave out a stage that repeats the graph before it: `lowered` closes the list whether or not a pass ran."""
    kept = list(stages[:1])
    for name, program in stages[1:]:
        if program.entries[0].graph is not kept[-1][1].entries[0].graph:
            kept.append((name, program))
    return kept


def blame(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, Any] | None = None,
    compiled: bool = True,
    progress: Progress = lambda text: None,
    **kwargs: Any,
) -> Verdict:
    """Find the first pass after which outputs leave tolerance against eager, on the given inputs.

    Every graph is lowered with 0, 1, 2, ... rewrites and interpreted. Where that stays clean and `compiled` is true,
    the whole model runs through TorchInductor with and without our rewrites, so that a fault of emission is told from
    one of TorchInductor.
    """
    asked = Options.parse(options)
    check_doors(asked)
    rows: tuple[Row, ...] = ()
    for graph, program in _graphs(model, inputs, kwargs):
        target = target_of(asked, program.device)
        verdict = _bisect(graph, program, target, replace(asked, require=()), progress)
        if verdict.culprit is not None:
            return verdict
        rows = (*rows, *verdict.rows)
    if compiled:
        return _emission(model, inputs, kwargs, dict(options or {}), rows, progress)
    return Verdict(None, "", None, rows)


def _graphs(
    model: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[SeenGraph, Program]]:
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    seen = observe(skeletons.real(model, tuple(inputs), kwargs), keep_inputs=True)
    if seen.stop is not None:
        raise EffError("EFF-G311", f"the model itself fails: {seen.stop.reason}", source=seen.stop.source or None)
    return [(graph, graph.program) for graph in seen.graphs if graph.program is not None]


def _bisect(graph: SeenGraph, program: Program, target: Target, options: Options, progress: Progress) -> Verdict:
    reference = Reference.of(program, graph.inputs)

    def run(fuel: int | None, choice: Options) -> tuple[Row, tuple[str, ...]]:
        done = compile_program(program, target, choice, Dump(None), fuel)
        name = done.ran[-1] if done.ran and fuel else "kernels"
        return reference.compare(name, execute(done.program, graph.inputs), reference.outputs), done.ran

    rows: list[Row] = []
    fuel, last = 0, -1
    while True:
        progress(f"{graph.owner or 'the model'}: {fuel} rewrites")
        row, ran = run(fuel, options)
        if len(ran) == last:
            return Verdict(None, graph.owner, None, tuple(rows))
        rows.append(row)
        if not row.within:
            break
        fuel, last = fuel + 1, len(ran)
    if fuel == 0:
        return Verdict(
            "kernels", graph.owner, 0, tuple(rows), note="recognition, or a kernel that replaced a raised op"
        )
    repaired, _ = run(None, _without(options, row.stage))
    return Verdict(row.stage, graph.owner, fuel, tuple(rows), confirmed=repaired.within)


def _without(options: Options, name: str) -> Options:
    mine = tuple(item for item in options.passes if item.name != name)
    if len(mine) < len(options.passes):
        return replace(options, passes=mine)
    return replace(options, disable=(*options.disable, name))


def _emission(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: dict[str, Any],
    rows: tuple[Row, ...],
    progress: Progress,
) -> Verdict:
    options.pop("require", None)
    model = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    progress("eager")
    eager = _flat(model, inputs, kwargs)
    progress("compiled with our rewrites")
    ours = _flat(_fresh_compile(model, "eff", options), inputs, kwargs)
    reference = Reference(eager, tuple(_widened(value) for value in eager))
    row = reference.compare("eff", ours, eager)
    if _close(ours, eager):
        return Verdict(None, "", None, (*rows, replace(row, within=True)))
    progress("compiled by TorchInductor alone")
    plain = _flat(_fresh_compile(model, "inductor", {}), inputs, kwargs)
    both = (*rows, replace(row, within=False), reference.compare("inductor", plain, eager))
    if not _close(plain, eager):
        return Verdict("inductor", "", None, both, note="TorchInductor leaves tolerance without our rewrites too")
    return Verdict(
        "emission", "", None, both, note="the rewritten graph is right when interpreted and wrong when compiled"
    )


def _close(found: Sequence[Any], eager: Sequence[Any]) -> bool:
    from torch._dynamo.utils import same

    floats = [(a, b) for a, b in zip(eager, found) if isinstance(a, torch.Tensor)]
    low = any(a.dtype in (torch.float16, torch.bfloat16) for a, _ in floats)
    return all(same(a, b, tol=2e-2 if low else 1e-3, equal_nan=True, log_error=lambda *_: None) for a, b in floats)


def _fresh_compile(model: Callable[..., Any], backend: str, options: dict[str, Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, options=options or None)


def _flat(call: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    import copy

    from torch.utils import _pytree as pytree

    args, named = copy.deepcopy((tuple(inputs), dict(kwargs)))
    with torch.no_grad():
        return tuple(pytree.tree_leaves(call(*args, **named)))


def _widened(value: Any) -> Any:
    return value.to(torch.float64) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
