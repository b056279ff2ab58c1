"""Choose a policy and a kernel for every site and the passes of every graph; every refusal keeps its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from effcompile.core.errors import ContractError
from effcompile.core.kernel import Answer, Supported
from effcompile.core.mask import Mask
from effcompile.core.plan import Choice, Decline, Plan, Range, Split
from effcompile.core.policy import DENSE_LAYER, RAISED, SITE_FAMILIES, Kernels, Policy, Proposal, left_by
from effcompile.core.site import AttentionSite, Missed, Refusal, shared
from effcompile.core.sizes import Size
from effcompile.core.target import Target
from effcompile.planning.paying import symbolic_note, unpaid
from effcompile.planning.ranges import Decision, Group, Kind, Priced, decide

KERNEL = "attention-kernel"
MARGIN = 0.04  # of the time of the source's own kernel: timings of one kernel differ by about that


@dataclass(frozen=True)
class PassChoice:
    """Say whether a graph pass runs, and why not; `asked` tells that the user gave it."""

    name: str
    refusal: Refusal | None = None
    asked: bool = False


@dataclass(frozen=True)
class Circumstances:
    """Hold what prices depend on besides the site.

    With `training`, only kernels and policies through which gradients flow are asked. `sizes` are the graph's symbolic
    sizes, `others` the seconds of the rest of the graph at given values of them. Policies of the families in `insist`
    run also where they do not pay.
    """

    target: Target
    kernels: Kernels
    training: bool = False
    sizes: Mapping[str, Size] = field(default_factory=dict)
    others: Callable[[Mapping[str, int]], float] = lambda values: 0.0
    insist: frozenset[str] = frozenset()


def make_plan(
    sites: Sequence[AttentionSite],
    missed: Sequence[Missed],
    given: Circumstances,
    passes: Sequence[PassChoice],
    *,
    policies: Sequence[Policy] = (),
    fingerprints: Mapping[str, str] | None = None,
) -> Plan:
    """Return the plan of one graph; `policies` are asked in order, each about the site as those before it leave it.

    `fingerprints` are those of sites that are planned on fewer tokens than the source has.
    """
    known_by = {site.id: site.fingerprint for site in sites} | dict(fingerprints or {})
    choices: list[Choice] = []
    declined: list[Decline] = []
    kinds: dict[str, Kind] = {}
    known: dict[tuple[Policy, AttentionSite], Refusal | str] = {}
    for site in sites:
        taken: tuple[Policy, ...] = ()
        density, seen = 1.0, site
        for policy in policies:
            proposal = propose(policy, seen, given, left_by(taken), density)
            paying = _paying(policy, proposal, seen, given, known)
            if isinstance(paying, Refusal):
                proposal, paying = paying, ""
            if isinstance(proposal, Refusal):
                declined.append(Decline(site.id, policy.family, policy.spelled, proposal, site.source))
                continue
            taken = (*taken, policy.settled())
            reason = policy.told(proposal, seen) + paying
            density, seen = density * proposal.density, policy.narrowed(seen)
            choices.append(Choice(site.id, policy.family, taken[-1].spelled, reason, proposal.seconds, proposal.tag))
        kinds[site.id] = kind_of(site, taken, density)
        declined.extend(_declined(site, kinds[site.id], given))
    made, split, note = choose_kernels(kinds, given)
    choices.extend(made)
    for item in missed:
        declined.append(Decline(item.site.id, "attention", "raise", item.refusal, item.site.source))
    for each in passes:
        if each.refusal is None:
            choices.append(Choice("graph", "pass", each.name))
        else:
            declined.append(Decline("graph", "pass", each.name, each.refusal))
    return Plan.single(
        str(given.target),
        choices,
        declined=tuple(declined),
        fingerprints=tuple(sorted(known_by.items())),
        training=given.training,
        notes=(f"attention: {note}",) if note else (),
        split=split,
    )


def _paying(
    policy: Policy,
    proposal: Proposal,
    site: AttentionSite,
    given: Circumstances,
    known: dict[tuple[Policy, AttentionSite], Refusal | str],
) -> Refusal | str:
    """Return why a proposal would slow the site down, or what there is to say of its length; equal sites are asked once."""
    if isinstance(proposal, Refusal) or policy.family in given.insist:
        return ""
    key = (policy, shared(site))
    if key not in known:
        known[key] = unpaid(policy, proposal, site, given) or symbolic_note(policy, site, given)
    return known[key]


def propose(
    policy: Policy, site: AttentionSite, given: Circumstances, op: str = RAISED, density: float = 1.0
) -> Proposal:
    """Ask a policy about a site that is now `op` at a density; in training one through which no gradient flows refuses."""
    if op not in policy.inside:
        return Refusal("EFF-A509", f"`{policy.name}` does not go with the policy before it, which leaves {op}")
    if given.training and (why := policy.gradient(site)) is not None:
        return why
    return policy.propose(site, given.target, replace(given.kernels, before=op, density=density))


def kind_of(site: AttentionSite, policies: Sequence[Policy] = (), density: float = 1.0) -> Kind:
    """Return a site as its policies leave it, without what does not change its price."""
    if not policies:
        return Kind(shared(site), RAISED, 1.0, source_kernel(site))
    for policy in policies:
        site = policy.narrowed(site)
    return Kind(shared(site), left_by(policies), density, "")


def source_kernel(site: AttentionSite) -> str:
    """Return the kernel that runs a site as its source spells it."""
    if site.idiom.startswith("flex"):
        return "flex"
    if not site.idiom.startswith("sdpa"):
        return "math"
    return "sdpa" if isinstance(site.mask, Mask) and site.mask.is_full else "dense"


def ask_kernels(kind: Kind, seen: AttentionSite, given: Circumstances) -> Iterator[tuple[str, Answer]]:
    """Yield the answer of every kernel that lowers what the policy leaves; `seen` is the site, perhaps at other sizes."""
    if kind.op != RAISED:
        for sparse in given.kernels.of(kind.op):
            yield sparse.name, sparse.supports(seen, given.target, kind.density)
        return
    for kernel in given.kernels.exact:
        why = kernel.gradient(seen) if given.training else None
        yield kernel.name, why or kernel.supports(seen, given.target)


def _declined(site: AttentionSite, kind: Kind, given: Circumstances) -> Iterator[Decline]:
    for name, answer in ask_kernels(kind, kind.site, given):
        if isinstance(answer, Refusal):
            yield Decline(site.id, KERNEL, name, answer, site.source)


def choose_kernels(kinds: Mapping[str, Kind], given: Circumstances) -> tuple[list[Choice], Split | None, str]:
    """Return the kernel of every site, by id, where a size is split, and why it is not; equal sites are decided once."""
    counts: dict[Kind, int] = {}
    for kind in kinds.values():
        counts[kind] = counts.get(kind, 0) + 1

    def ask(kind: Kind, seen: AttentionSite) -> dict[str, Supported]:
        return {name: found for name, found in ask_kernels(kind, seen, given) if isinstance(found, Supported)}

    found = decide(counts, ask, MARGIN, given.sizes, given.others, two=not given.training)
    made: dict[Kind, tuple[Choice, ...]] = {}
    for group, below, above in zip(found.groups, found.below, found.above, strict=True):
        sides: dict[Range, Priced] = {"any": below} if below is above else {"below": below, "above": above}
        made[group.kind] = tuple(_choice(group, curve, side, found, given) for side, curve in sides.items())
    choices = [replace(choice, site=site) for site, kind in kinds.items() for choice in made[kind]]
    return choices, found.split, found.note


def _choice(group: Group, curve: Priced, side: Range, found: Decision, given: Circumstances) -> Choice:
    """Return the choice for one range, priced at the length that the graph was traced with, or at the nearest in range."""
    length, where = curve.lengths[0], ""
    if group.symbol is not None:
        length = given.sizes[group.symbol].hint
        if found.split is not None and side != "any" and found.split.side(length) != side:
            length = max(1, found.split.at - 1) if side == "below" else found.split.at
        where = f" at {group.symbol} = {length}"
    others = sorted((other.at(length), other.name) for other in group.curves if other is not curve)
    answer = curve.answer(length)
    following = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for seconds, name in others)
    reason = f"mask {group.kind.site.mask}{where}" + (f"; next {following}" if following else "")
    return Choice("", KERNEL, curve.name, reason, answer.seconds, answer.tag, side)


def keep_contract(
    plan: Plan,
    require: Sequence[tuple[str, str]],
    sites: Sequence[AttentionSite],
    missed: Sequence[Missed],
    *,
    asked: Sequence[str] = (),
) -> None:
    """Raise EFF-P502 unless as many sites were rewritten as `require` asks for; the error lists the missed ones.

    Where a policy of a family was `asked` for, a site counts if one rewrites it. Layers that the policy itself keeps dense are not
    missed. Where none was, a site counts for `attention` if it was raised, and for another family never.
    """
    for family, wanted in require:
        if family not in SITE_FAMILIES:
            continue
        lines = [f"  {m.site.id} ({m.site.source or 'no source'}): {m.refusal}" for m in missed]
        rewritten = len(sites) if family == "attention" else 0
        if family in asked:
            rewritten = len({choice.site for choice in plan.choices if choice.family == family})
            for item in plan.declined:
                if item.family == family and item.policy != "raise" and item.refusal.code != DENSE_LAYER:
                    lines.append(f"  {item.site} ({item.source or 'no source'}): {item.policy}: {item.refusal}")
        elif family != "attention":
            lines += [
                f"  {site.id} ({site.source or 'no source'}): no policy of the family was asked for" for site in sites
            ]
        if (lines and wanted == "all") or (wanted != "all" and rewritten < int(wanted)):
            told = "\n".join(lines)
            raise ContractError(
                "EFF-P502",
                f"`require` {family}={wanted}: {rewritten} of {len(sites) + len(missed)} sites rewritten\n{told}",
                hint="eff explain MODEL shows every reason; drop `require` to run anyway",
            )
