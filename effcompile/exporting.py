"""Export a model to files that run without it: the same plan decides, each site is accounted for, and the result is checked.

    eff.export(model, args, to="onnx", out="out/")

The program is captured by torch.export with sizes that may vary, its rewrites run for the target, and the emitter of the form
(`codegen/emitters`) writes the files. Where the form runs on this machine, it must give eager's numbers at two values of every
size that varies before anything is at `out`. A policy that was asked for and has no form there is an error, unless
`allow_dropped` is given.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from effcompile import discover
from effcompile.capture.export import capture_export, restore_export
from effcompile.compiler import Compiled, compile_program
from effcompile.core.artifact import Check, Manifest, SiteForm
from effcompile.core.bundle import read_artifact, writing
from effcompile.core.dump import Dump
from effcompile.core.emitter import Emitter, Job, Runner, Say, Settings, Variant, missing
from effcompile.core.errors import ContractError, EffError, unknown
from effcompile.core.experts import FAMILY
from effcompile.core.options import Options
from effcompile.core.policy import SITE_FAMILIES
from effcompile.core.program import Program
from effcompile.core.target import Target
from effcompile.core.tokens import FAMILY as TOKENS
from effcompile.core.tokens import SCHEDULED
from effcompile.targets import devices
from effcompile.targets.detect import detect_cpu

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""The largest |difference| over the largest |reference| that a check accepts, by the dtype of the output."""


def emitters() -> dict[str, Emitter]:
    """Return every form of an export by its name: the folder `codegen/emitters`, and those of other distributions."""
    found = discover.classes(Emitter, *discover.folders("effcompile.codegen.emitters"))  # type: ignore[type-abstract]
    return {item.name: item() for item in found}


def emitter(name: str) -> Emitter:
    """Return the form called `name`, or raise EFF-E113."""
    known = emitters()
    if name not in known:
        raise unknown("EFF-E113", "form of an export", name, known)
    return known[name]


def targets_of(form: Emitter, asked: str | Sequence[str] | None) -> tuple[Target, ...]:
    """Return the targets that were asked for (`sm_80,sm_89`), each of which the form can do.

    Raises:
        EffError: EFF-T101 and EFF-T102 for a word that names none; EFF-E151 where the form needs one and none is named.
        ContractError: with the form's own code and reason where it cannot build for one.
    """
    words = [asked] if isinstance(asked, str) else list(asked or ())
    words = [word.strip() for text in words for word in text.split(",") if word.strip()] or [form.default()]
    known = (replace(detect_cpu(), name="cpu"), *devices())
    found: dict[str, Target] = {}
    for word in words:
        device, _, backend = word.partition(":")
        if backend and backend != form.name:
            raise EffError("EFF-E151", f"{word} is no target of {form.name}", hint=f"--to {backend}, or {device} alone")
        target = Target(detect_cpu() if device == "cpu" else Target.parse(device, known).device, form.name)
        if (refusal := form.refuse(target)) is not None:
            raise ContractError(refusal.code, refusal.reason, hint=refusal.hint or None)
        found[target.device.word] = target
    return tuple(found.values())


@dataclass(frozen=True)
class _Call:
    """Hold a model's call as flat tensors: `sizes` names what may vary in each of them, None where a size is fixed."""

    values: tuple[Tensor, ...]
    sizes: tuple[tuple[str | None, ...], ...]

    def hints(self) -> dict[str, int]:
        """Return the sizes of the given call."""
        return {s: n for x, row in zip(self.values, self.sizes, strict=True) for n, s in zip(x.shape, row) if s}

    def at(self, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        """Return the tensors at other sizes: their content is repeated, or cut."""
        made = []
        for value, row in zip(self.values, self.sizes, strict=True):
            for dim, name in enumerate(row):
                if name and sizes[name] != value.shape[dim]:
                    value = value.index_select(dim, torch.arange(sizes[name]) % value.shape[dim])
            made.append(value)
        return tuple(made)


def export(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    to: str,
    out: str | Path,
    target: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    opset: int = 0,
    seconds: float = Settings.seconds,
    profile: str = "",
    dynamic: bool = True,
    allow_dropped: bool = False,
    force: bool = False,
    name: str = "",
    say: Say = lambda text: None,
) -> Manifest:
    """Write a model to a folder, or to a zip where `out` ends so, and return what its manifest says.

    Args:
        model: a module in eval mode, an ExportedProgram, or a catalog that the form has itself (`kernels:all` of `triton`).
        args, kwargs: the arguments of one call; sizes of at least 2 may vary later.
        to: a file of `codegen/emitters`: `onnx`, for example. out: where the artifact goes. target: chips (`sm_80,sm_89`);
            None takes the form's own. options: as for torch.compile. opset: of ONNX, 18 to 23; 0 takes the form's own.
        seconds: how long the build of one engine may take. profile: the sizes that it takes (`tokens.1=1:128:2048`).
        dynamic: let every size vary that the model lets vary.
        allow_dropped: accept sites whose policy has no form there. force: replace an artifact. name: what to call the model.
        say: hears what is being done.

    Raises:
        EffError: EFF-E101 where something is at `out`; EFF-E109 where an operator has no form; EFF-E110 where the result gives
            other numbers than eager; EFF-E114 where torch.export cannot capture the model.
        ContractError: EFF-E108 for policies that have no form there; the form's own code for a target that it cannot do.
    """
    form = emitter(to)
    targets = targets_of(form, target)
    if lacking := missing(form.needs):
        raise EffError(
            "EFF-E112", f"{', '.join(lacking)} not installed", hint=f"pip install 'effcompile[{form.extra}]'"
        )
    asked, settings = Options.parse({**(options or {}), "strict": True}), Settings(opset, seconds, profile)
    asked = replace(asked, disable=(*asked.disable, *form.without))
    with torch.no_grad(), writing(Path(out), force=force) as draft:
        sites: dict[str, SiteForm] = {}
        if isinstance(model, str):
            if not form.catalog or not model.startswith(form.catalog):
                raise EffError("EFF-E151", f"{to} exports models; `{model}` is a name", hint="pass the module itself")
            job = Job(model, targets, (), (), settings, lambda runner: ((), ()), say)
        else:
            say("capturing")
            exported = _captured(model, tuple(args), dict(kwargs or {}), dynamic)
            variants: list[Variant] = []
            for each in targets if form.each_target else targets[:1]:
                say("rewriting" if len(targets) == 1 else f"rewriting for {each}")
                # A program of its own for each target: lowering marks nodes.
                compiled = compile_program(_program(exported, each), each, asked, Dump(None))
                sites |= {f"{x.site} {x.form}": x for x in _forms(compiled, asked)}
                restore = functools.partial(restore_export, exported, compiled.program)
                variants.append(Variant(each, compiled.plan, compiled.program, restore))
            _keep_or_refuse(sites.values(), to, allow_dropped)
            for place, variant in enumerate(variants):
                file = "plan.json" if place == 0 else f"plans/{variant.target.device.word}.json"
                draft.file(file).write_text(variant.plan.to_json() + "\n", encoding="utf-8")
            call = _call_of(exported, capture_export(exported))

            # What drops tokens gives other numbers by intent: the translation is compared with the rewritten program.
            lossy = any(choice.family == TOKENS for variant in variants for choice in variant.plan.choices)

            def check(runner: Runner) -> tuple[tuple[Check, ...], tuple[str, ...]]:
                return _checked(variants[0].restore().module() if lossy else model, exported, call, runner)

            title = name or type(model).__name__
            job = Job(title, targets, tuple(variants), tuple(call.hints().items()), settings, check, say)
        made = form.emit(job, draft)
        draft.manifest = Manifest(
            form=to,  # type: ignore[arg-type]
            model=job.model,
            target=",".join(map(str, targets)),
            plan_hash=job.variants[0].plan.hash if job.variants else "",
            versions=tuple((package, _version(package)) for package in ("effcompile", "torch", *form.needs)),
            inputs=made.inputs,
            outputs=made.outputs,
            sites=tuple(sites.values()),
            checks=made.checks,
            details=made.details,
        )
        say("writing")
    with read_artifact(Path(out)) as found:
        return found.manifest


def _program(exported: torch.export.ExportedProgram, target: Target) -> Program:
    """Return the program as the target's own device would have captured it."""
    program = capture_export(exported)
    return program if target.portable or target.device.kind == "cpu" else replace(program, device="cuda")


def _keep_or_refuse(sites: Iterable[SiteForm], to: str, allow_dropped: bool) -> None:
    if (dropped := [site for site in sites if site.status == "dropped"]) and not allow_dropped:
        told = "; ".join(f"{site.site}: {site.form}: {site.reason}" for site in dropped[:3])
        raise ContractError("EFF-E108", f"{len(dropped)} choices have no form in {to}: {told}", hint="--allow-dropped")


def load(path: str | Path, *, provider: str = "cpu", threads: int | None = None, trust: bool = False) -> Runner:
    """Check an artifact and return what runs it: a call takes tensors by input name and returns outputs by name.

    `trust` opens machine code, which runs whatever its maker wrote.

    Raises:
        EffError: as `read_artifact`; EFF-E107 for machine code without `trust`; EFF-E111 and EFF-E112 where it cannot run here.
    """
    with read_artifact(Path(path), trust=trust) as found:
        return emitter(found.manifest.form).load(found, provider, threads)


def compare(
    session: Runner, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[float, torch.dtype]]:
    """Run an artifact and its model on one call; return for each output its error and the model's dtype.

    Raises:
        EffError: EFF-E110 where they have not the same number of outputs, EFF-E111 where the artifact does not take the call.
    """
    with torch.no_grad():
        wanted = [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
    tensors = [x for x in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(x, Tensor)]
    return _errors(session, tensors, wanted)


def _errors(
    session: Runner, tensors: Sequence[Tensor], wanted: Sequence[Tensor]
) -> dict[str, tuple[float, torch.dtype]]:
    if len(tensors) != len(session.inputs):
        raise EffError("EFF-E111", f"the call has {len(tensors)} tensors, the artifact takes {len(session.inputs)}")
    values = session(dict(zip(session.inputs, tensors, strict=True)))
    if len(values) != len(wanted):
        raise EffError("EFF-E110", f"the export has {len(values)} outputs, the model {len(wanted)}")
    return {n: (_error(x, exact), exact.dtype) for (n, x), exact in zip(values.items(), wanted, strict=True)}


def _captured(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> torch.export.ExportedProgram:
    if isinstance(model, torch.export.ExportedProgram):
        return model
    auto = torch.export.Dim.AUTO

    def free(value: Any) -> Any:
        return dict.fromkeys(range(value.ndim), auto) if isinstance(value, Tensor) else None

    shapes: Any = None
    if dynamic:
        # torch.export takes one structure for all arguments, by name where some are keywords.
        places, words = pytree.tree_map(free, args), pytree.tree_map(free, kwargs)
        shapes = {**dict(zip(_parameters(model), places)), **words} if kwargs else places
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        told = " ".join(str(error).split())[:400]
        raise EffError(
            "EFF-E114",
            f"torch.export cannot capture the model: {type(error).__name__}: {told}",
            hint="eff explain MODEL names graph breaks; --static (dynamic=False) fixes every size",
        ) from error


def _parameters(model: Any) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _forms(compiled: Compiled, asked: Options) -> Iterator[SiteForm]:
    """Yield what became of every site: the plan was made for this target, so what it chose is there.

    A dispatch of experts that was asked for and has no form there gave way to another exact one.
    """
    graph, families = compiled.plan.graphs[0], dict(asked.families)
    for choice in graph.choices:
        if choice.site:
            other = choice.family == FAMILY and families.get(FAMILY, choice.policy) != choice.policy
            yield SiteForm(choice.site, "substituted" if other else "same", choice.policy, choice.reason)
    for decline in graph.declined:
        asked_for = decline.family in (*SITE_FAMILIES, TOKENS) and decline.family in families
        if asked_for and decline.refusal.code != SCHEDULED:
            yield SiteForm(decline.site, "dropped", decline.policy, f"{decline.refusal.code} {decline.refusal.reason}")


def _call_of(exported: torch.export.ExportedProgram, program: Program) -> _Call:
    args, kwargs = exported.example_inputs
    flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    entry = program.entries[0]
    nodes = {node.name: node for node in entry.graph.graph.nodes if node.op == "placeholder"}
    users = [
        item.node for item in entry.inputs if item.kind == "user" and isinstance(nodes[item.node].meta["val"], Tensor)
    ]
    return _Call(tuple(flat), tuple(_sizes(nodes[name]) for name in users))


def _sizes(node: fx.Node) -> tuple[str | None, ...]:
    return tuple(
        str(size) if isinstance(size, torch.SymInt) and str(size).isidentifier() else None
        for size in node.meta["val"].shape
    )


def _checked(
    model: Any, exported: torch.export.ExportedProgram, call: _Call, session: Runner
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Compare an export with eager at the given sizes, and with each size that may vary at another one.

    Returns the comparisons, and the sizes that could not be changed alone since the model holds them to others.
    """
    guarded = exported.module()
    eager = guarded if model is exported else model
    hints = call.hints()
    found: list[Check] = []
    held: list[str] = []
    for name, sizes in [("", hints), *((s, {**hints, s: n + 1 + place}) for place, (s, n) in enumerate(hints.items()))]:
        tensors = call.at(sizes)
        leaves = iter(tensors)
        given = [next(leaves) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(exported.example_inputs)]
        args, kwargs = pytree.tree_unflatten(given, exported.call_spec.in_spec)
        try:
            guarded(*args, **kwargs)
        except AssertionError as guard:
            if not name or "Guard failed" not in str(guard):
                raise
            held.append(name)
            continue
        wanted = [x for x in pytree.tree_leaves(eager(*args, **kwargs)) if isinstance(x, Tensor)]
        for output, (error, kind) in _errors(session, tensors, wanted).items():
            if not error <= LIMITS.get(kind, 0.0):
                told = ", ".join(f"{key}={n}" for key, n in sizes.items())
                raise EffError(
                    "EFF-E110",
                    f"`{output}` is {error:.2e} away from eager at {told or 'the given sizes'}",
                    hint="model.eval() turns dropout off; eff repro MODEL finds a rewrite that is wrong",
                )
            found.append(Check(tuple(sizes.items()), float(f"{error:.3g}"), output))
    return tuple(found), tuple(held)


def _error(value: Tensor, exact: Tensor) -> float:
    if value.shape != exact.shape:
        return float("inf")
    if not exact.dtype.is_floating_point:
        return 0.0 if torch.equal(value, exact) else float("inf")
    found, wanted = value.double(), exact.double()
    same = (found == wanted) | (found.isnan() & wanted.isnan())  # infinities and NaN must be where they were
    apart = torch.where(same, 0.0, (found - wanted).abs()).max() if found.numel() else torch.zeros(())
    scale = wanted.abs()[wanted.isfinite()].max() if wanted.isfinite().any() else torch.ones(())
    return float("inf") if apart.isnan() else float(apart / scale.clamp_min(1e-30))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
