"""Run the six stages in order. Read this file first.

    capture -> recognize -> plan -> rewrite -> lower -> emit

Stages never call each other; values pass through here. Every decision sits in the plan, everything after it is mechanical.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from effcompile import discover, ops
from effcompile.capture.dynamo import in_module, module_of
from effcompile.core.dump import Dump
from effcompile.core.errors import EffError, unknown
from effcompile.core.experts import FAMILY, ExpertDispatch, MoESite
from effcompile.core.kernel import AttentionKernel, SparseKernel
from effcompile.core.options import Options
from effcompile.core.plan import Choice, Decline, Plan, Range
from effcompile.core.policy import SITE_FAMILIES, Kernels, Method, Policy, read_policy
from effcompile.core.program import Program
from effcompile.core.rewrite import Pass, ordered
from effcompile.core.site import AttentionSite, CacheSite, Missed, Refusal
from effcompile.core.sizes import Size, symbolic_sizes
from effcompile.core.target import Target
from effcompile.core.tokens import FAMILY as TOKENS
from effcompile.core.tokens import TokenReduction
from effcompile.core.verify import verify
from effcompile.lowering.attention.estimate import price_choice
from effcompile.lowering.lower import lower
from effcompile.lowering.moe.lower import lower_experts
from effcompile.passes.attention.rewrite import rewrite_attention
from effcompile.passes.recognize.attention import Recognized, recognize_attention
from effcompile.passes.recognize.expert_loops import loop_behind
from effcompile.passes.recognize.experts import RecognizedExperts, recognize_experts
from effcompile.passes.recognize.head_axis import uncuttable
from effcompile.passes.recognize.kv_buffers import find_buffers
from effcompile.passes.recognize.kv_cache import recognize_caches
from effcompile.passes.recognize.sublayers import recognize_sublayers
from effcompile.passes.recognize.tokens import recognize_tokens
from effcompile.passes.tokens.masks import narrowed
from effcompile.passes.tokens.rewrite import rewrite_tokens
from effcompile.planning import experts as planning_experts
from effcompile.planning import tokens as planning_tokens
from effcompile.planning.planner import Circumstances, PassChoice, keep_contract, make_plan
from effcompile.planning.pricing import products
from effcompile.planning.replay import replayed


@dataclass(frozen=True)
class Compiled:
    """Hold what the stages before emission produced, and how long each took (seconds).

    Where the plan splits a symbolic size, `program` is for the `range` of the value that was traced, and `other`
    makes the program of the other range.
    """

    program: Program
    plan: Plan
    sites: tuple[AttentionSite, ...]
    missed: tuple[Missed, ...]
    pinned: tuple[str, ...] = ()
    seconds: tuple[tuple[str, float], ...] = ()
    ran: tuple[str, ...] = ()
    range: Range = "any"
    other: Callable[[], Program] | None = None
    caches: tuple[CacheSite, ...] = ()
    experts: tuple[MoESite, ...] = ()
    experts_missed: tuple[Missed, ...] = ()


@dataclass
class _Clock:
    parts: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.parts[name] = self.parts.get(name, 0.0) + now - self.begun
        self.begun = now


Storing = Callable[[Recognized], tuple[Recognized, tuple[Choice, ...], tuple[Decline, ...]]]
"""Store the caches that a program keeps in its own tensors in another form; return what was chosen for them, and what was not."""


def compile_program(
    program: Program,
    target: Target,
    options: Options,
    dump: Dump,
    fuel: int | None = None,
    storing: Storing | None = None,
) -> Compiled:
    """Rewrite and lower a captured program for a target; the caller emits it."""
    ops.register()
    clock, tank = _Clock(), _Fuel(fuel)
    passes, kernels = all_passes(options), catalog(target)
    dump.program("captured", program)
    early = [item for item in _phase(passes, "captured") if _refusal(item, options, False, target) is None]
    program = _run(early, program, Plan.single(str(target)), dump, tank)
    found = recognize_attention(program, _locate)
    program = verify(program, found.program, "recognize")
    chosen_caches: tuple[Choice, ...] = ()
    kept_caches: tuple[Decline, ...] = ()
    if storing is not None:
        found, chosen_caches, kept_caches = storing(found)
        program = verify(program, found.program, "caches")
    own, _ = find_buffers(program, _locate)
    caches = (*recognize_caches(program, _locate), *(item.site for item in own))
    experts = recognize_experts(program, _locate)
    program = verify(program, experts.program, "recognize experts")
    dump.program("recognized", program)
    tokens = _plan_tokens(program, found, experts, options)
    clock.lap("recognize")

    sizes = symbolic_sizes(program.entries[0].graph.graph)
    originals = {site.id: site.fingerprint for site in found.sites}
    found = replace(found, sites=tokens.sites)
    plan = _plan(found, experts, program, target, options, kernels, passes, sizes, originals)
    plan = plan.with_more(tokens.choices, tokens.declined)
    plan = plan.with_more(chosen_caches, kept_caches)
    policies = policies_of(plan)
    asked = {policy.family for mine in policies.values() for policy in mine} | {
        p.family for p in asked_policies(options)
    }
    keep_contract(plan, options.require, found.sites, found.missed, asked=sorted(asked))
    left = [(item.site.id, item.site.source, str(item.refusal)) for item in experts.missed]
    planning_experts.keep_experts(options.require, len(experts.sites), left)
    planning_tokens.keep_tokens(options.require, (plan,))
    dump.text("plan.json", plan.to_json())
    clock.lap("plan")

    chosen = [p for p in passes if p.name in plan.passes()]

    def rewrite(program: Program, plan: Plan, dump: Dump, tank: _Fuel, clock: _Clock) -> Program:
        shorter, sites = rewrite_tokens(program, found.sites, tokens.policies, target.portable)
        program = verify(program, shorter, "token policies")
        sparse, sites = rewrite_attention(program, sites, policies)
        program = verify(program, sparse, "attention policies")
        dump.program("policies", program)
        program = _run(_phase(chosen, "raised"), program, plan, dump, tank)
        clock.lap("rewrite")
        program = verify(program, lower(program, plan, sites, kernels).program, "lower")
        program = verify(program, lower_experts(program, plan, experts.sites, all_dispatches()), "lower experts")
        dump.program("kernels", program)
        program = _run(_phase(chosen, "lowered"), program, plan, dump, tank)
        dump.program("lowered", program)
        clock.lap("lower")
        return program

    split, other = plan.split, None
    here: Range = "any" if split is None else split.side(sizes[split.size].hint)
    if split is not None and fuel is None:
        there: Range = "above" if here == "below" else "below"
        recognized = program

        def other() -> Program:
            return rewrite(recognized, plan.within(there), dump.beside(there), _Fuel(None), _Clock())

    program = rewrite(program, plan.within(here), dump, tank, clock)
    return Compiled(
        program,
        plan.with_notes(tank.notes),
        found.sites,
        found.missed,
        found.pinned,
        tuple(clock.parts.items()),
        tuple(tank.ran),
        here,
        other,
        caches,
        experts.sites,
        experts.missed,
    )


def own_caches(program: Program) -> tuple[CacheSite, ...]:
    """Return the caches that a Dynamo graph keeps in buffers of its modules, and not in an object that it was given."""
    ops.register()
    found, _ = find_buffers(recognize_attention(program, _locate).program, _locate)
    return tuple(item.site for item in found if in_module(item.base))


def unprepared(program: Program) -> str | None:
    """Return the module, within that of the graph, whose loop over experts broke a graph; None where none did."""
    return loop_behind(program, _locate)


def _locate(node: fx.Node) -> tuple[str, str]:
    return module_of(node), node.meta.get("eff.source", "")


def _plan(
    found: Recognized,
    experts: RecognizedExperts,
    program: Program,
    target: Target,
    options: Options,
    kernels: Kernels,
    passes: Sequence[Pass],
    sizes: Mapping[str, Size],
    originals: Mapping[str, str],
) -> Plan:
    training = program.requires_grad
    choices = [
        PassChoice(p.name, _refusal(p, options, training, target), asked=p in options.passes)
        for p in passes
        if p.phase != "captured"
    ]

    def others(values: Mapping[str, int]) -> float:
        return sum(products(entry, target.device, values) for entry in program.entries)

    insist = frozenset(family for family, _ in options.require)
    given = Circumstances(target, kernels, training, sizes, others, insist)
    asked = asked_policies(options)
    dispatches = tuple(item for item in all_dispatches() if item.portable or not target.portable)
    if options.plan is None:
        plan = make_plan(found.sites, found.missed, given, choices, policies=asked, fingerprints=originals)
        dispatch = asked_dispatch(options)
        return planning_experts.with_experts(plan, experts.sites, experts.missed, target, dispatches, dispatch)
    # Sites are known by what they are in the source, also where they are planned on fewer tokens.
    known = others_known = {**originals, **planning_experts.fingerprints(experts.sites)}
    named = policies_of(options.plan.part(known, training))
    part = replayed(options.plan, found.sites, given, choices, named, others_known)
    return planning_experts.replay_experts(part, experts.sites, target, dispatches)


def _plan_tokens(
    program: Program, found: Recognized, experts: RecognizedExperts, options: Options
) -> planning_tokens.TokenPlan:
    """Decide how many tokens reach each site; without a token policy nothing is looked for."""
    asked, given, training = asked_tokens(options), options.plan, program.requires_grad
    known = {site.id: site.fingerprint for site in found.sites} | planning_experts.fingerprints(experts.sites)
    part = None if given is None else given.part(known, training)
    policy = planning_tokens.policy_of(asked, part, all_tokens())
    if policy is None:
        return planning_tokens.TokenPlan(found.sites, {})
    streams, refusals = (recognize_sublayers if policy.around else recognize_tokens)(program, found.sites)
    cuts = policy.heads < 1
    held = [
        planning_tokens.StreamSites(*stream, heads=uncuttable(program, stream[0]) if cuts else None)
        for stream in streams
    ]
    if asked is None:
        return planning_tokens.replay_tokens(part, found.sites, held, training, narrowed, all_tokens())
    return planning_tokens.plan_tokens(asked, found.sites, held, refusals, training, narrowed)


def _refusal(item: Pass, options: Options, training: bool, target: Target) -> Refusal | None:
    if item.name in options.disable:
        return Refusal("EFF-U010", "disabled by the user")
    if target.portable and not item.portable:
        return Refusal("EFF-A215", f"{target.backend} does not hold what it inserts")
    for family in item.apart_from:
        if _asks_for(family, options):
            return Refusal("EFF-U010", f"left out beside a policy of the family `{family}`")
    if training and not item.differentiable:
        return Refusal("EFF-A301", "no gradient flows through what it inserts", "run inference under torch.no_grad()")
    return None


def _asks_for(family: str, options: Options) -> bool:
    """Tell whether the options, or the plan that they hold, name a policy of a family."""
    plans = () if options.plan is None else options.plan.choices
    return family in dict(options.families) or any(choice.family == family for choice in plans)


@dataclass
class _Fuel:
    """Count rewrites, so that EFF_FUEL=n stops after n of them and a bad one can be bisected."""

    left: int | None
    ran: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _run(passes: Sequence[Pass], program: Program, plan: Plan, dump: Dump, tank: _Fuel) -> Program:
    for item in passes:
        if tank.left is not None and len(tank.ran) >= tank.left:
            tank.notes.append(f"{item.name}: out of fuel")
            continue
        result = item.run(program, plan)
        if result.changed:
            program = verify(program, result.program, item.name)
            tank.ran.append(item.name)
            dump.program(item.name, program)
        tank.notes.extend(f"{item.name}: {note}" for note in result.notes)
    return program


def _phase(passes: Sequence[Pass], phase: str) -> list[Pass]:
    return [item for item in passes if item.phase == phase]


def catalog(target: Target | None = None) -> Kernels:
    """Return every kernel, of attention and of the ops that policies insert; for a portable target those that it can hold."""
    exact = tuple(kernel for kernel in all_kernels() if kernel.portable or target is None or not target.portable)
    found = discover.classes(SparseKernel, *discover.folders("effcompile.lowering"))  # type: ignore[type-abstract]
    sparse = () if target is not None and target.portable else tuple(cls() for cls in found)
    return Kernels(exact, sparse, price_choice)


def all_policies() -> tuple[type[Policy], ...]:
    """Return every policy."""
    return discover.classes(Policy, *discover.folders("effcompile.passes"))  # type: ignore[type-abstract]


def all_methods() -> tuple[type[Method], ...]:
    """Return every policy and every cache format."""
    return discover.classes(Method, *discover.folders("effcompile.passes"))  # type: ignore[type-abstract]


def asked_policies(options: Options) -> tuple[Policy, ...]:
    """Return the policies for sites that the options ask for, in the order in which they are applied.

    Raises:
        EffError: EFF-U014, EFF-U003 or EFF-U004 where one is misspelled, EFF-U015 beside a plan.
    """
    asked = [(family, text) for family, text in options.families if family in SITE_FAMILIES]
    _not_beside_a_plan(options, asked[0][0] if asked else "")
    known = all_policies()
    return tuple(read_policy(family, text, known) for family, text in sorted(asked, key=lambda item: _order(item[0])))


def all_tokens() -> tuple[type[TokenReduction], ...]:
    """Return every token policy."""
    return discover.classes(TokenReduction, *discover.folders("effcompile.passes"))  # type: ignore[type-abstract]


def asked_tokens(options: Options) -> TokenReduction | None:
    """Return the token policy that the options ask for; raise as `asked_policies` does."""
    text = dict(options.families).get(TOKENS)
    _not_beside_a_plan(options, TOKENS if text is not None else "")
    return None if text is None else read_policy(TOKENS, text, all_tokens())


def _not_beside_a_plan(options: Options, family: str) -> None:
    if family and options.plan is not None:
        raise EffError(
            "EFF-U015",
            f"`{family}` together with `plan`, which names the policy of every site",
            hint="edit the plan, or leave one of them out",
        )


def policies_of(plan: Plan) -> dict[str, tuple[Policy, ...]]:
    """Return the policies that the plan of one graph names, by site, in the order in which they are applied."""
    known = all_policies()
    found: dict[str, tuple[Policy, ...]] = {}
    for choice in sorted((c for c in plan.choices if c.family in SITE_FAMILIES), key=lambda c: _order(c.family)):
        found[choice.site] = (*found.get(choice.site, ()), read_policy(choice.family, choice.policy, known))
    return found


def _order(family: str) -> int:
    return SITE_FAMILIES.index(family)


def all_dispatches() -> tuple[ExpertDispatch, ...]:
    """Return one instance of every dispatch of experts."""
    found = discover.classes(ExpertDispatch, *discover.folders("effcompile.lowering"))  # type: ignore[type-abstract]
    return tuple(cls() for cls in found)


def asked_dispatch(options: Options) -> str:
    """Return the dispatch of experts that the options ask for, '' where they ask for none.

    Raises:
        EffError: EFF-U014 where there is none of that name, EFF-U015 beside a plan.
    """
    asked = dict(options.families).get(FAMILY, "")
    planning_experts.check_asked(asked, all_dispatches())
    _not_beside_a_plan(options, FAMILY if asked else "")
    return asked


def all_kernels() -> tuple[AttentionKernel, ...]:
    """Return one instance of every attention kernel."""
    found = discover.classes(AttentionKernel, *discover.folders("effcompile.lowering"))  # type: ignore[type-abstract]
    return tuple(cls() for cls in found)


def all_passes(options: Options) -> tuple[Pass, ...]:
    """Return the passes in the order in which they run; the user's own join their phase at its end."""
    found = discover.classes(Pass, *discover.folders("effcompile.passes", "effcompile.lowering"))  # type: ignore[type-abstract]
    built_in = [cls() for cls in found if cls.default]
    names = {item.name for item in built_in}
    for name in options.disable:
        if name not in names:
            raise unknown("EFF-U011", "pass", name, names, hint="eff passes")
    return ordered([*built_in, *options.passes])
