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
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from effcompile import discover
from effcompile.capture.export import capture_export, restore_export
from effcompile.capture.subject import Subject, subject
from effcompile.codegen.onnx.graph import FILE
from effcompile.codegen.onnx.probe import Probe
from effcompile.codegen.onnx.second_opinion import SecondOpinion
from effcompile.compiler import Compiled, all_methods, compile_program
from effcompile.core.artifact import Check, Manifest, SiteForm
from effcompile.core.bundle import read_artifact, writing
from effcompile.core.cache import CacheFormat
from effcompile.core.dump import Dump
from effcompile.core.emitter import Emitter, Job, Names, Runner, Say, Settings, Variant, missing
from effcompile.core.errors import ContractError, EffError, unknown
from effcompile.core.experts import FAMILY
from effcompile.core.export_form import Dialect, OnnxForm
from effcompile.core.options import Options
from effcompile.core.plan import Plan
from effcompile.core.policy import SITE_FAMILIES, read_policy
from effcompile.core.program import Program
from effcompile.core.target import Target
from effcompile.core.tokens import FAMILY as TOKENS
from effcompile.core.tokens import SCHEDULED
from effcompile.export_checks import Call, call_of, checked
from effcompile.lowering.onnx.gqa import GroupQuery
from effcompile.lowering.onnx.lower import Written, lower_onnx
from effcompile.planning.portable import followed, policies
from effcompile.targets import devices
from effcompile.targets.detect import detect_cpu

TOKENIZER = "tokenizer.json"
SITE_KERNELS = ("attention-kernel", FAMILY)
"""Families of choices that say how a site runs; others say what it computes."""


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
    flavor: str = "portable",
    seconds: float = Settings.seconds,
    profile: str = "",
    dynamic: bool = True,
    cache: bool | None = None,
    part: str = "",
    buffers: bool = False,
    allow_dropped: bool = False,
    force: bool = False,
    name: str = "",
    tokenizer: str = "",
    say: Say = lambda text: None,
) -> Manifest:
    """Write a model to a folder, or to a zip where `out` ends so, and return what its manifest says.

    Args:
        model: a module in eval mode, an ExportedProgram, or a catalog that the form has itself (`kernels:all` of `triton`).
        args, kwargs: the arguments of one call; sizes of at least 2 may vary later.
        to: a file of `codegen/emitters`: `onnx`, for example. out: where the artifact goes. target: chips (`sm_80,sm_89`);
            None takes the form's own. options: as for torch.compile. opset: of ONNX, 18 to 24; 0 takes the form's own.
        flavor: `portable`, or `ort` for operators of ONNX Runtime. dynamic: let every size vary that the model lets vary.
        seconds: how long the build of one engine may take. profile: the sizes that it takes (`tokens.1=1:128:2048`; several
            profiles with `;` between them).
        cache: take and return keys and values of a decoder of transformers; by default in ONNX where a call is its token ids.
        part: `encoder` or `decoder` of an encoder-decoder of transformers, with its caches: one artifact each.
        buffers: let a decoder's cache be buffers of a capacity, which a call writes into.
        allow_dropped: accept sites whose policy has no form there. force: replace an artifact. name: what to call the model.
        tokenizer: JSON of the one that belongs to it, to take along. say: hears what is being done.

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
    settings = Settings(opset, seconds, profile, flavor)
    dialect = form.dialect(settings)
    if dialect is None and flavor != "portable":
        raise EffError("EFF-E113", f"{to} has no flavors", hint="--to onnx has")
    wishes = dict(options or {})
    stored = _format(wishes.pop("kv", None))
    asked = Options.parse({**wishes, "strict": True})
    plan, asked = asked.plan, replace(asked, plan=None, disable=(*asked.disable, *form.without))
    if plan is not None:
        asked = replace(asked, families=tuple(dict([*policies(plan), *asked.families]).items()))
    sites: tuple[SiteForm, ...] = ()
    with torch.no_grad(), writing(Path(out), force=force) as draft:
        if isinstance(model, str):
            if not form.catalog or not model.startswith(form.catalog):
                raise EffError("EFF-E151", f"{to} exports models; `{model}` is a name", hint="pass the module itself")
            job = Job(model, targets, (), (), settings, lambda runner: ((), ()), say)
        else:
            say("capturing")
            whole = cache if dialect is not None else bool(cache)
            given = subject(
                model,
                tuple(args),
                dict(kwargs or {}),
                dynamic,
                whole,
                format=stored,
                own=flavor == "portable",
                part=part,
                buffers=buffers,
            )
            title = name or type(model).__name__
            job, sites = _job(title, given, form, targets, asked, plan, settings, dialect, say)
            _keep_or_refuse(sites, to, allow_dropped)
            for place, variant in enumerate(job.variants):
                file = "plan.json" if place == 0 else f"plans/{variant.target.device.word}.json"
                draft.file(file).write_text(variant.plan.to_json() + "\n", encoding="utf-8")
            if tokenizer:
                draft.file(TOKENIZER).write_text(tokenizer, encoding="utf-8")
        made = form.emit(job, draft)
        details = made.details
        if not isinstance(model, str):
            details += (
                ("cache", "past_key_values" if given.points is not None else ""),
                ("buffers", "max_sequence_length" if buffers else ""),
                ("part", part),
                ("ends", json.dumps(_ends(model)) if tokenizer else ""),
                ("kv", stored.spelled if stored is not None else ""),
            )
        draft.manifest = Manifest(
            form=to,  # type: ignore[arg-type]
            model=job.model,
            target=",".join(map(str, targets)),
            plan_hash=job.variants[0].plan.hash if job.variants else "",
            versions=tuple((package, _version(package)) for package in ("effcompile", "torch", *form.needs)),
            inputs=made.inputs,
            outputs=made.outputs,
            sites=sites,
            checks=made.checks,
            details=details,
        )
        say("writing")
    with read_artifact(Path(out)) as found:
        return found.manifest


def _job(
    title: str,
    given: Subject,
    form: Emitter,
    targets: tuple[Target, ...],
    asked: Options,
    plan: Plan | None,
    settings: Settings,
    dialect: Dialect | None,
    say: Say,
) -> tuple[Job, tuple[SiteForm, ...]]:
    """Rewrite and lower a model for every target that the form asks for; return that and what became of the sites."""
    exported = given.exported()
    found: dict[str, SiteForm] = {}
    variants: list[Variant] = []
    for each in targets if form.each_target else targets[:1]:
        say("rewriting" if len(targets) == 1 else f"rewriting for {each}")
        # A program of its own for each target: lowering marks nodes.
        compiled = compile_program(_program(exported, each), each, asked, Dump(None))
        written = Written(compiled.program, (), (), (), ())
        if dialect is not None:
            places = {site.id: site for site in compiled.sites}
            written = lower_onnx(compiled.program, dialect, _all_forms(), Probe(dialect), places)
        found |= {f"{x.site} {x.form}": x for x in _forms(compiled, asked, written)}
        restore = functools.partial(restore_export, exported, written.program)
        told = ("forms", ", ".join(f"{n} x {x}" for x, n in written.placed))
        kept = ("declined forms", "; ".join(sorted({f"{p.form}: {why.reason}" for p, why in written.kept})))
        details = (told, kept) if dialect is not None else ()
        variants.append(Variant(each, compiled.plan, written.program, restore, written.functions, details))
    sites = tuple(found.values())
    if plan is not None:
        sites = followed(plan, sites, [family for family, _ in asked.families])
    call = call_of(exported, capture_export(exported))
    single = GroupQuery.name in dict(written.placed)
    # What drops tokens gives other numbers by intent: the translation is compared with the rewritten program.
    lossy = any(choice.family == TOKENS for variant in variants for choice in variant.plan.choices)

    def check(runner: Runner) -> tuple[tuple[Check, ...], tuple[str, ...]]:
        meant = restore_export(exported, compiled.program).module() if lossy else None
        return checked(given, exported, call, runner, single, meant)

    names = Names(given.inputs, given.outputs, given.sizes or call.sizes)
    hints = tuple(Call(call.values, given.sizes or call.sizes).hints().items())
    return Job(title, targets, tuple(variants), hints, settings, check, say, names), sites


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


def second_opinion(path: str | Path) -> Runner:
    """Check an artifact and return its ONNX file run by Polygraphy, nothing fused.

    Raises:
        EffError: as `read_artifact`; EFF-E175 without Polygraphy, or without an ONNX file.
    """
    with read_artifact(Path(path)) as found:
        if FILE not in dict(found.manifest.files):
            raise EffError("EFF-E175", f"an artifact of {found.manifest.form} has no ONNX file", hint="--to onnx has")
        return SecondOpinion(found.file(FILE))


def _ends(model: Any) -> list[int]:
    """Return the token ids that end a text."""
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    found = getattr(config, "eos_token_id", None)
    return [] if found is None else [int(x) for x in (found if isinstance(found, list | tuple) else (found,))]


def _format(kv: Any) -> CacheFormat | None:
    if kv is None or isinstance(kv, CacheFormat):
        return kv
    found = read_policy("kv", str(kv), all_methods())
    assert isinstance(found, CacheFormat)
    return found


def _all_forms() -> tuple[OnnxForm, ...]:
    found = discover.classes(OnnxForm, *discover.folders("effcompile.lowering"))  # type: ignore[type-abstract]
    return tuple(cls() for cls in found)


def _forms(compiled: Compiled, asked: Options, written: Written) -> Iterator[SiteForm]:
    """Yield what became of every site: the plan was made for this target, so what it chose is there.

    Where an operator of ONNX gave other numbers alone, the site is `substituted` by what it stands for. A dispatch of experts that
    was asked for and has no form there gave way to another exact one.
    """
    graph, families = compiled.plan.graphs[0], dict(asked.families)
    forms = dict(written.sites)
    kept = {place.site: refusal for place, refusal in written.kept if place.site not in forms}
    for choice in graph.choices:
        if choice.site in kept and choice.family in SITE_KERNELS:
            yield SiteForm(choice.site, "substituted", choice.policy, str(kept[choice.site]))
        elif choice.site:
            other = choice.family == FAMILY and families.get(FAMILY, choice.policy) != choice.policy
            form = choice.policy if choice.family not in SITE_KERNELS else forms.get(choice.site, choice.policy)
            yield SiteForm(choice.site, "substituted" if other else "same", form, choice.reason)
    for decline in graph.declined:
        asked_for = decline.family in (*SITE_FAMILIES, TOKENS) and decline.family in families
        if asked_for and decline.refusal.code != SCHEDULED:
            yield SiteForm(decline.site, "dropped", decline.policy, f"{decline.refusal.code} {decline.refusal.reason}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
