"""Follow a plan that was given: find the part of a graph, and refuse what cannot be followed before anything is applied.

A plan is a file that a person may edit, so a choice is only followed where the kernel says that it runs the site exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

from effcompile.core.errors import EffError, unknown
from effcompile.core.kernel import AttentionKernel
from effcompile.core.plan import Choice, Plan
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.target import Target
from effcompile.planning.planner import KERNEL, PassChoice


def replayed(
    plan: Plan,
    sites: Sequence[AttentionSite],
    target: Target,
    kernels: Sequence[AttentionKernel],
    passes: Sequence[PassChoice],
    *,
    training: bool = False,
) -> Plan:
    """Return the part of a plan for one graph.

    Raises EFF-P501 where the plan has no graph with these sites, EFF-P506 where a choice names a kernel or pass that
    is not there, that cannot run the site exactly on this target, or that the options leave out.
    """
    part = plan.part({site.id: site.fingerprint for site in sites}, training)
    known = {kernel.name: kernel for kernel in kernels}
    for site in sites:
        choice = part.of(site.id, KERNEL)
        if choice is None:
            raise EffError(
                "EFF-P506", "the plan has no kernel for it", site=site.id, hint="eff plan MODEL -o plan.json"
            )
        if choice.policy not in known:
            raise unknown("EFF-P506", "kernel in the plan", choice.policy, known, hint="eff show plan.json")
        if (why := _refusal(known[choice.policy], site, target, training)) is not None:
            raise _refused(choice, why)
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


def _refusal(kernel: AttentionKernel, site: AttentionSite, target: Target, training: bool) -> Refusal | None:
    if training and (why := kernel.gradient(site)) is not None:
        return why
    answer = kernel.supports(site, target)
    return answer if isinstance(answer, Refusal) else None


def _refused(choice: Choice, why: Refusal) -> EffError:
    return EffError(
        "EFF-P506",
        f"the plan runs it with `{choice.policy}`, which cannot run it exactly here: {why}",
        site=choice.site,
        hint="eff plan MODEL -o plan.json",
    )


def _check_sites(part: Plan, sites: Sequence[AttentionSite]) -> None:
    """Refuse a second choice for a site, and one for a site that is not there: neither would be followed."""
    ids = [choice.site for choice in part.choices if choice.family == KERNEL]
    known = {site.id for site in sites}
    for number, name in enumerate(ids):
        if name not in known:
            raise unknown("EFF-P506", "site in a choice of the plan", name, known)
        if name in ids[:number]:
            raise EffError("EFF-P506", "the plan has two kernels for it", site=name)
