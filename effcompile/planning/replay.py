"""Follow a plan that was given: find the part of a graph, and refuse what cannot be followed before anything is applied.

A plan is a file that a person may edit, so a choice is only followed where the kernel says that it runs the site exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from effcompile.core.errors import EffError, unknown
from effcompile.core.plan import Plan
from effcompile.core.policy import Kernels, Policy
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.planning.planner import KERNEL, PassChoice, ask_kernels, choose_kernel, propose


def replayed(
    plan: Plan,
    sites: Sequence[AttentionSite],
    target: Target,
    kernels: Kernels,
    passes: Sequence[PassChoice],
    policies: Mapping[str, Policy],
    *,
    training: bool = False,
) -> Plan:
    """Return the part of a plan for one graph; `policies` are those that it names, by site.

    A person who edits the policy of a site need not know which kernels run it: where the named kernel fits the site no longer,
    another is chosen, and a note says so.

    Raises EFF-P501 where the plan has no graph with these sites, EFF-P506 where a choice names a kernel or pass that
    is not there, that cannot run the site exactly on this target, or that the options leave out, or a policy that refuses the site.
    """
    part = plan.part({site.id: site.fingerprint for site in sites}, training)
    sparse = {kernel.name for kernel in kernels.sparse}
    known = {kernel.name for kernel in kernels.exact} | sparse
    for site in sites:
        policy, density = policies.get(site.id), 1.0
        if policy is not None:
            proposal = propose(policy, site, target, kernels, training)
            if isinstance(proposal, Refusal):
                raise _refused(policy.spelled, site, proposal)
            density = proposal.density
        choice = part.of(site.id, KERNEL)
        if choice is None:
            raise EffError(
                "EFF-P506", "the plan has no kernel for it", site=site.id, hint="eff plan MODEL -o plan.json"
            )
        if choice.policy not in known:
            raise unknown("EFF-P506", "kernel in the plan", choice.policy, known, hint="eff show plan.json")
        seen = site if policy is None else policy.narrowed(site)
        answers = dict(ask_kernels(seen, policy, density, target, kernels, training))
        why = answers.get(choice.policy, Refusal("EFF-A506", "it does not lower what the policy of the site inserts"))
        if isinstance(why, Refusal):
            if policy is None and choice.policy not in sparse:
                raise _refused(choice.policy, site, why)
            better, _ = choose_kernel(site, policy, density, target, kernels, training)
            part = part.with_choice(better).with_notes((f"{site.id}: {better.policy}, not {choice.policy}: {why}",))
    _check_sites(part, sites)
    _check_passes(part, passes)
    return part


def _check_passes(part: Plan, passes: Sequence[PassChoice]) -> None:
    """Refuse passes that the plan runs and that cannot run here, and a user's own that the plan says nothing about."""
    refusals = {choice.name: choice.refusal for choice in passes}
    for name in part.passes():
        if name not in refusals:
            raise unknown("EFF-P506", "pass in the plan", name, refusals, hint="eff passes")
        if (why := refusals[name]) is not None:
            raise EffError("EFF-P506", f"the plan runs the pass `{name}`, which cannot run: {why}")
    settled = {*part.passes(), *(item.policy for item in part.declined if item.family == "pass")}
    for choice in passes:
        if choice.asked and choice.refusal is None and choice.name not in settled:
            raise EffError(
                "EFF-P506",
                f"the plan was made without the pass `{choice.name}` that the options bring",
                hint="make the plan with the same passes: eff plan MODEL --pass MODULE:CLASS -o plan.json",
            )


def _refused(name: str, site: AttentionSite, why: Refusal) -> EffError:
    return EffError(
        "EFF-P506",
        f"the plan runs it with `{name}`, which cannot run it exactly here: {why}",
        site=site.id,
        hint="eff plan MODEL -o plan.json",
    )


def _check_sites(part: Plan, sites: Sequence[AttentionSite]) -> None:
    """Refuse a second choice for a site, and one for a site that is not there: neither would be followed."""
    ids = [(choice.family, choice.site) for choice in part.choices if choice.family != "pass"]
    known = {site.id for site in sites}
    for number, (family, name) in enumerate(ids):
        if name not in known:
            raise unknown("EFF-P506", "site in a choice of the plan", name, known)
        if (family, name) in ids[:number]:
            what = "kernels" if family == KERNEL else "policies"
            raise EffError("EFF-P506", f"the plan has two {what} for it", site=name)
