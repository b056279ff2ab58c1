"""Dry-run a model: what would be rewritten for a target, what would not, and why.

    print(eff.explain(model, *inputs, target="sm_90"))

The model is traced on copies without data, so no weight is read and no GPU is needed; the target decides, not this
machine. All that `torch.compile(model, backend="eff")` decides is decided here by the same code; only emission is left
out.
"""

from __future__ import annotations

import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from effcompile import skeleton as skeletons
from effcompile.backend import check_doors, target_of
from effcompile.compiler import Compiled, all_kernels, all_passes, compile_program
from effcompile.core.dump import Dump
from effcompile.core.errors import EffError
from effcompile.core.experts import FAMILY
from effcompile.core.options import Options
from effcompile.core.policy import SITE_FAMILIES
from effcompile.core.program import Break, Program
from effcompile.core.site import AttentionSite, place
from effcompile.core.target import Target
from effcompile.core.tokens import FAMILY as TOKENS
from effcompile.lowering.attention import estimate
from effcompile.lowering.rates import attained
from effcompile.modules import attention_modules, expert_modules, holders
from effcompile.observe import Observation, SeenGraph, observe, observe_export
from effcompile.planning import pricing
from effcompile.planning.caches import CacheRow
from effcompile.planning.expert_rows import ExpertRow
from effcompile.planning.explain import Explanation, GraphRow, MissedRow, PassRow, SiteRow, Unseen
from effcompile.planning.planner import KERNEL
from effcompile.skeleton import Skeleton, strip

_ON_WEIGHTS = "; the weights themselves may answer it: real=True (--real)"


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    target: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    real: bool = False,
    name: str = "",
    command: str = "",
    **kwargs: Any,
) -> Explanation:
    """Return what `torch.compile(model, backend="eff", options=options)(*inputs, **kwargs)` would do on `target`.

    Args:
        model: a module, on any device or on meta; its weights are not read. A plain function runs on its inputs as they
        are. An
            ExportedProgram has its graph already and needs no inputs.
        inputs: the arguments of one call; of tensors only shape and dtype count. target: a device word such as `sm_90`,
        `h100`, `cpu`; None is this machine. options: as for torch.compile. `require` is counted against the module tree
        here, so that attention behind a graph break
            or in an unrecognized spelling breaks it too.
        dynamic: as for torch.compile.
        real: run on the weights and inputs themselves; for models whose control flow asks for values.
        name: what to call the model in the report.
        command: the shell command that makes the same report.
        kwargs: keyword arguments of the call.

    Raises:
        EffError: unknown options or targets; EFF-G310 where the model cannot be copied without its data.
        ContractError: EFF-P502 with the missed sites.
    """
    asked = Options.parse({**(options or {}), **({"target": target} if target is not None else {})})
    check_doors(asked)
    chosen = target_of(asked, "cuda" if torch.cuda.is_available() else "cpu")
    with _uncollected():
        found = _explained(model, inputs, kwargs, asked, chosen, dynamic, real, name, command)
    found.keep_contract(asked.require)
    return found


def _explained(
    model: Callable[..., Any],
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    asked: Options,
    chosen: Target,
    dynamic: bool | None,
    real: bool,
    name: str,
    command: str,
) -> Explanation:
    began = time.perf_counter()
    exported = isinstance(model, torch.export.ExportedProgram)
    dry = exported or (isinstance(model, nn.Module) and not real)
    if exported:
        skeleton = Skeleton(model, lambda: ((), {}))
        observation = observe_export(model)  # type: ignore[arg-type]
    else:
        skeleton = strip(model, inputs, kwargs) if dry else skeletons.real(model, inputs, kwargs)  # type: ignore[arg-type]
        observation = observe(skeleton, dynamic=dynamic)
    traced = time.perf_counter()
    explanation = describe(observation, skeleton.model, chosen, asked.insisting())
    rest = time.perf_counter() - traced - sum(seconds for _, seconds in explanation.seconds)
    return replace(
        explanation,
        model=name or type(model).__name__,
        stop=explanation.stop + (_ON_WEIGHTS if explanation.stop and dry else ""),
        inputs=(*map(_spelled, inputs), *(f"{word}={_spelled(value)}" for word, value in kwargs.items())),
        weights="not read" if dry else "real",
        seconds=(("trace", traced - began), *explanation.seconds, ("price", rest)),
        command=command,
    )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Hold off the garbage collector: tracing makes a million objects that live, and it would look at them again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def describe(observation: Observation, model: Any, target: Target, options: Options) -> Explanation:
    """Decide every observed graph for a target and account for every module that looks like attention."""
    price = _Pricer.of(target)
    graphs: list[GraphRow] = []
    sites: list[SiteRow] = []
    missed: list[MissedRow] = []
    caches: list[CacheRow] = []
    experts: list[ExpertRow] = []
    left: list[tuple[str, str, str]] = []
    totals: dict[str, float] = {}
    for number, graph in enumerate(observation.graphs):
        row, compiled = _decide(graph, target, options)
        graphs.append(row)
        for stage, seconds in row.seconds:
            totals[stage] = totals.get(stage, 0.0) + seconds
        if compiled is not None:
            sites.extend(_rows(compiled, graph, number, price))
            missed.extend(MissedRow(place(graph.owner, m.site.id), number, m) for m in compiled.missed)
            caches.extend(_cache_rows(compiled, graph, number))
            experts.extend(_expert_rows(compiled, graph, number))
            left.extend((place(graph.owner, m.site.id), m.site.source, str(m.refusal)) for m in compiled.experts_missed)
    breaks = _named_breaks(observation, model)
    reached = frozenset(path for row in sites for path in row.places) | {row.id for row in missed}
    reached |= {path.rpartition(".cache")[0] for row in caches for path in row.places}
    stop = observation.stop
    return Explanation(
        model="",
        target=str(target),
        device=target.device,
        inputs=(),
        weights="",
        graphs=tuple(graphs),
        sites=tuple(sites),
        missed=tuple(missed),
        caches=tuple(caches),
        experts=tuple(experts),
        experts_kept=(*left, *_outside(model, observation, breaks, experts, left)),
        breaks=breaks,
        unseen=_unseen(model, observation, breaks, reached),
        seconds=tuple(totals.items()),
        machine=machine(target),
        policy=", ".join(text for family, text in options.families if family in SITE_FAMILIES),
        stop=f"{stop.reason} at {stop.source or '?'}{' in ' + stop.module if stop.module else ''}" if stop else "",
    )


def on_target(graph: SeenGraph, target: Target) -> Program | None:
    """Return the program as the target's own device would have captured it (a dry run captures on fake CPU tensors)."""
    if graph.program is None:
        return None
    return replace(graph.program, device="cpu" if target.device.kind == "cpu" else "cuda")


def _decide(graph: SeenGraph, target: Target, options: Options) -> tuple[GraphRow, Compiled | None]:
    empty = GraphRow(graph.owner, len(graph.owners), graph.nodes, None, graph.refusal)
    program = on_target(graph, target)
    if program is None:
        return empty, None
    try:
        compiled = compile_program(program, target, options, Dump(None))
    except EffError as error:
        if error.exit_code != 4:
            raise
        return replace(empty, refusal=error), None
    except Exception as error:  # what the backend answers with a fallback and a warning
        return replace(
            empty, refusal=EffError("EFF-X999", f"{type(error).__name__}: {error}", hint="eff repro MODEL")
        ), None
    products = sum(pricing.products(entry, target.device) for entry in program.entries)
    row = replace(
        empty,
        plan=compiled.plan.with_places(graph.owners),
        seconds=compiled.seconds,
        passes=_passes(compiled, options),
        products=products,
    )
    return row, compiled


def _passes(compiled: Compiled, options: Options) -> tuple[PassRow, ...]:
    refused = {d.policy: str(d.refusal) for d in compiled.plan.declined if d.family == "pass"}
    rows = []
    for item in all_passes(options):
        notes = [n.removeprefix(f"{item.name}: ") for n in compiled.plan.notes if n.startswith(f"{item.name}: ")]
        state = "rewrote" if item.name in compiled.ran else "no change"
        if item.name in options.disable:
            state = "disabled"
        elif item.name in refused:
            state = "refused"
            notes.insert(0, refused[item.name])
        rows.append(PassRow(item.name, item.phase, state, "; ".join(notes)))
    return tuple(rows)


@dataclass(frozen=True)
class _Pricer:
    floor: Callable[[AttentionSite], Any]
    pays: Callable[[AttentionSite], Any]

    @classmethod
    def of(cls, target: Target) -> _Pricer:
        kernels, device = all_kernels(), attained(target.device)
        return cls(
            pricing.once(lambda site: pricing.floor(site, device, estimate.density(site))),
            pricing.once(lambda site: pricing.crossovers(site, kernels, target)),
        )


def _rows(compiled: Compiled, graph: SeenGraph, number: int, price: _Pricer) -> list[SiteRow]:
    rows = []
    for site in compiled.sites:
        choice = compiled.plan.within(compiled.range).of(site.id, KERNEL)
        policies = [c for family in SITE_FAMILIES if (c := compiled.plan.of(site.id, family)) is not None]
        assert choice is not None, f"no kernel was chosen for {site.id}"
        shorter = compiled.plan.of(site.id, TOKENS)
        declined = tuple(d for d in compiled.plan.declined if d.site == site.id)
        rows.append(
            SiteRow(
                id=place(graph.owner, site.id),
                graph=number,
                places=tuple(dict.fromkeys(place(owner, site.id) for owner in graph.owners or [""])),
                instances=max(1, len(graph.owners)),
                site=site,
                kernel=compiled.plan.policy(site.id, KERNEL),
                reason=choice.reason,
                seconds=choice.seconds or 0.0,
                tag=choice.tag,
                floor=price.floor(site),
                declined=declined,
                pays=() if policies else price.pays(site),
                policy=", ".join(choice.policy for choice in policies),
                density="; ".join(choice.reason for choice in policies),
                tokens="" if shorter is None else f"{shorter.policy}: {shorter.reason}",
            )
        )
    return rows


def _cache_rows(compiled: Compiled, graph: SeenGraph, number: int) -> list[CacheRow]:
    rows = []
    for site in compiled.caches:
        places = tuple(dict.fromkeys(place(owner, site.id) for owner in graph.owners or [""]))
        rows.append(CacheRow(place(graph.owner, site.id), number, places, site))
    return rows


def _expert_rows(compiled: Compiled, graph: SeenGraph, number: int) -> list[ExpertRow]:
    rows = []
    for site in compiled.experts:
        choice = compiled.plan.of(site.id, FAMILY)
        assert choice is not None, f"no dispatch was chosen for {site.id}"
        places = tuple(dict.fromkeys(place(owner, site.id) for owner in graph.owners or [""]))
        declined = tuple(d for d in compiled.plan.declined if d.site == site.id and d.family == FAMILY)
        made = (choice.policy, choice.reason, choice.seconds or 0.0, choice.tag, declined)
        rows.append(ExpertRow(place(graph.owner, site.id), number, places, site, *made))
    return rows


def _outside(
    model: Any,
    observation: Observation,
    breaks: Sequence[Break],
    rows: Sequence[ExpertRow],
    left: Sequence[tuple[str, str, str]],
) -> list[tuple[str, str, str]]:
    """Return (place, source, reason) of experts that ran and of which no graph holds the products, and what mends it."""
    reached = {path.removesuffix(".experts") for row in rows for path in row.places}
    reached |= {path.removesuffix(".experts") for path, _, _ in left}
    found = []
    for path, module in expert_modules(model):
        inside = path.removesuffix(".experts")
        if any(at == inside or at.startswith(inside + ".") or inside.startswith(at + ".") for at in reached):
            continue
        near = [b for b in breaks if b.module and (path.startswith(b.module) or b.module.startswith(path))]
        if not near and path not in observation.called and observation.stop is None:
            continue
        where = near[0] if near else None
        reason = (
            f"behind the break: {where.reason}"
            if where
            else "and no graph has products that are known for those of experts"
        )
        if observation.stop is not None and where is None:
            reason = f"since the run stopped at {observation.stop.source or '?'}"
        text = f"EFF-M301 {type(module).__name__} runs outside the graphs, {reason} (eff.prepare(model) before torch.compile)"
        found.append((path, where.source if where else "", text))
    return found


def _named_breaks(observation: Observation, model: Any) -> tuple[Break, ...]:
    """Return the breaks with the module whose code left the graph."""
    found: dict[tuple[str, str], Break] = {}
    for graph in observation.graphs:
        for item in graph.breaks:
            paths = [path for path in holders(model, item.source) if path.startswith(graph.owner)]
            found.setdefault((item.source, item.reason), replace(item, module=paths[0] if paths else graph.owner))
    return tuple(found.values())


def _unseen(
    model: Any, observation: Observation, breaks: Sequence[Break], reached: frozenset[str]
) -> tuple[Unseen, ...]:
    rows = []
    for path, module in attention_modules(model):
        inside = path + "." if path else ""
        if any(at == path or at.startswith(inside) or path.startswith(at + ".") for at in reached):
            continue
        kind = type(module).__name__
        if path not in observation.called and not (observation.partial and breaks):
            stop = observation.stop
            reason = "the run stopped before it" if stop else "not called with these inputs"
            rows.append(Unseen(path, kind, reason, stop.source if stop else "", called=stop is not None))
            continue
        near = [b for b in breaks if b.module and (path.startswith(b.module) or b.module.startswith(path))]
        if near or breaks:
            item = (near or list(breaks))[0]
            reason = f"EFF-G301 runs outside the graphs, behind the break at {item.source or '?'}: {item.reason}"
            rows.append(Unseen(path, kind, reason, item.source))
        elif any(graph.refusal for graph in observation.graphs):
            refusal = next(graph.refusal for graph in observation.graphs if graph.refusal)
            rows.append(Unseen(path, kind, f"its graph was not captured: {refusal}"))
        else:
            rows.append(Unseen(path, kind, "EFF-A199 it ran, but nothing in its graph has the form of attention"))
    return tuple(rows)


def _spelled(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__ if not isinstance(value, int | float | str | bool | None) else repr(value)


def machine(target: Target) -> tuple[tuple[str, str], ...]:
    """Return what a reader needs to see the same again: versions, platform, and whether the target is here."""
    from effcompile import __version__

    facts = {"effcompile": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    for module in ("transformers", "diffusers"):
        if module in sys.modules:
            facts[module] = str(getattr(sys.modules[module], "__version__", "?"))
    facts["platform"] = f"{platform.system()} {platform.machine()}"
    facts["target present"] = "yes" if target.device.kind == "cpu" or torch.cuda.is_available() else "no, modelled"
    return tuple(facts.items())
