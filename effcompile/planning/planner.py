"""Choose a policy and a kernel for every site and the passes of every graph; every refusal keeps its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from effcompile.core.errors import ContractError
from effcompile.core.kernel import Answer, Supported
from effcompile.core.plan import Choice, Decline, Plan
from effcompile.core.policy import DENSE_LAYER, RAISED, Kernels, Policy, Proposal
from effcompile.core.site import AttentionSite, Missed, Refusal
from effcompile.core.target import Target

KERNEL = "attention-kernel"


@dataclass(frozen=True)
class PassChoice:
    """Say whether a graph pass runs, and why not; `asked` tells that the user gave it."""

    name: str
    refusal: Refusal | None = None
    asked: bool = False


def make_plan(
    sites: Sequence[AttentionSite],
    missed: Sequence[Missed],
    target: Target,
    kernels: Kernels,
    passes: Sequence[PassChoice],
    *,
    policy: Policy | None = None,
    training: bool = False,
) -> Plan:
    """Return the plan for one target. With `training`, only kernels and policies through which gradients flow are asked."""
    choices: list[Choice] = []
    declined: list[Decline] = []
    for site in sites:
        taken: Policy | None = None
        density = 1.0
        if policy is not None:
            proposal = propose(policy, site, target, kernels, training)
            if isinstance(proposal, Refusal):
                declined.append(Decline(site.id, policy.family, policy.spelled, proposal, site.source))
            else:
                taken, density = policy.settled(), proposal.density
                reason = f"density {density:.3g} of the pairs that {site.mask} keeps"
                choices.append(Choice(site.id, taken.family, taken.spelled, reason, proposal.seconds, proposal.tag))
        choice, refused = choose_kernel(site, taken, density, target, kernels, training)
        choices.append(choice)
        declined.extend(refused)
    for item in missed:
        declined.append(Decline(item.site.id, "attention", "raise", item.refusal, item.site.source))
    for made in passes:
        if made.refusal is None:
            choices.append(Choice("graph", "pass", made.name))
        else:
            declined.append(Decline("graph", "pass", made.name, made.refusal))
    prints = tuple(sorted((site.id, site.fingerprint) for site in sites))
    return Plan.single(str(target), choices, declined=tuple(declined), fingerprints=prints, training=training)


def propose(policy: Policy, site: AttentionSite, target: Target, kernels: Kernels, training: bool) -> Proposal:
    """Ask a policy about a site; with `training` one through which no gradient flows refuses."""
    if training and (why := policy.gradient(site)) is not None:
        return why
    return policy.propose(site, target, kernels)


def choose_kernel(
    site: AttentionSite, policy: Policy | None, density: float, target: Target, kernels: Kernels, training: bool
) -> tuple[Choice, list[Decline]]:
    """Return the cheapest kernel for a site as its policy leaves it, and the refusals of the others."""
    seen = site if policy is None else policy.narrowed(site)
    answers: list[tuple[float, str, Supported]] = []
    declined: list[Decline] = []
    for name, answer in ask_kernels(seen, policy, density, target, kernels, training):
        if isinstance(answer, Supported):
            answers.append((answer.seconds, name, answer))
        else:
            declined.append(Decline(site.id, KERNEL, name, answer, site.source))
    assert answers, f"no kernel runs {site}"
    answers.sort(key=lambda item: item[:2])
    _, name, best = answers[0]
    others = ", ".join(f"{other} {seconds * 1e3:.3g} ms" for seconds, other, _ in answers[1:])
    reason = f"mask {seen.mask}" + (f"; next {others}" if others else "")
    return Choice(site.id, KERNEL, name, reason, best.seconds, best.tag), declined


def ask_kernels(
    seen: AttentionSite, policy: Policy | None, density: float, target: Target, kernels: Kernels, training: bool
) -> Iterator[tuple[str, Answer]]:
    """Yield the answer of every kernel that lowers what the policy leaves at a site."""
    if policy is not None and policy.op != RAISED:
        for sparse in kernels.of(policy.op):
            yield sparse.name, sparse.supports(seen, target, density)
        return
    for kernel in kernels.exact:
        why = kernel.gradient(seen) if training else None
        yield kernel.name, why or kernel.supports(seen, target)


def keep_contract(
    plan: Plan,
    require: Sequence[tuple[str, str]],
    sites: Sequence[AttentionSite],
    missed: Sequence[Missed],
    *,
    asked: bool = False,
) -> None:
    """Raise EFF-P502 unless as many sites were rewritten as `require` asks for; the error lists the missed ones.

    Where a policy was `asked` for, a site counts if a policy rewrites it. Layers that the policy itself keeps dense are not missed.
    """
    lines = [f"  {m.site.id} ({m.site.source or 'no source'}): {m.refusal}" for m in missed]
    rewritten = len(sites)
    if asked:
        taken = {choice.site for choice in plan.choices if choice.family == "attention"}
        rewritten = len(taken)
        for item in plan.declined:
            if item.family == "attention" and item.policy != "raise" and item.refusal.code != DENSE_LAYER:
                lines.append(f"  {item.site} ({item.source or 'no source'}): {item.policy}: {item.refusal}")
    for family, wanted in require:
        if family != "attention":
            continue
        if (lines and wanted == "all") or (wanted != "all" and rewritten < int(wanted)):
            told = "\n".join(lines)
            raise ContractError(
                "EFF-P502",
                f"`require` attention={wanted}: {rewritten} of {len(sites) + len(missed)} sites rewritten\n{told}",
                hint="eff explain MODEL shows every reason; drop `require` to run anyway",
            )
