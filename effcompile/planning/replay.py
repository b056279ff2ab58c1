"""Follow a plan that was given: find the part of a graph, and refuse what cannot be followed before anything is applied.

A plan is a file that a person may edit, so a choice is only followed where the kernel says that it runs the site exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from effcompile.core.errors import EffError, unknown
from effcompile.core.plan import Plan, Range
from effcompile.core.policy import Policy, left_by
from effcompile.core.site import AttentionSite, Refusal
from effcompile.planning.planner import (
    KERNEL,
    Circumstances,
    PassChoice,
    ask_kernels,
    choose_kernels,
    kind_of,
    propose,
)
from effcompile.planning.ranges import Kind


def replayed(
    plan: Plan,
    sites: Sequence[AttentionSite],
    given: Circumstances,
    passes: Sequence[PassChoice],
    policies: Mapping[str, Sequence[Policy]],
    others: Mapping[str, str] | None = None,
) -> Plan:
    """Return the part of a plan for one graph; `policies` are those that it names, by site, `others` the fingerprints of sites of
    other kinds.

    A person who edits the policy of a site need not know which kernels run it: where the named kernel fits the site no longer,
    another is chosen, and a note says so.

    Raises EFF-P501 where the plan has no graph with these sites, EFF-P506 where a choice names a kernel or pass that
    is not there, that cannot run the site exactly on this target, or that the options leave out, or a policy that refuses the site.
    """
    others = others or {}
    part = plan.part({site.id: site.fingerprint for site in sites} | dict(others), given.training)
    for site in sites:
        mine, density, seen = policies.get(site.id, ()), 1.0, site
        for number, policy in enumerate(mine):
            proposal = propose(policy, seen, given, left_by(mine[:number]), density)
            if isinstance(proposal, Refusal):
                raise _refused(policy.spelled, site, proposal)
            density, seen = density * proposal.density, policy.narrowed(seen)
        for side in _sides(part):
            part = _checked(part, site, side, kind_of(site, mine, density), given, bool(mine))
    _check_sites(part, {*(site.id for site in sites), *others}, given)
    _check_passes(part, passes)
    return part


def _checked(part: Plan, site: AttentionSite, side: Range, kind: Kind, given: Circumstances, edited: bool) -> Plan:
    """Return the part where its kernel runs the site; one with another kernel where a policy was `edited`, else raise."""
    sparse = {kernel.name for kernel in given.kernels.sparse}
    known = {kernel.name for kernel in given.kernels.exact} | sparse
    choice = part.within(side).of(site.id, KERNEL)
    if choice is None:
        where = "" if part.split is None else f" where {part.split.text(side)}"
        raise EffError(
            "EFF-P506", f"the plan has no kernel for it{where}", site=site.id, hint="eff plan MODEL -o plan.json"
        )
    if choice.policy not in known:
        raise unknown("EFF-P506", "kernel in the plan", choice.policy, known, hint="eff show plan.json")
    answers = dict(ask_kernels(kind, kind.site, given))
    why = answers.get(choice.policy, Refusal("EFF-A506", "it does not lower what the policy of the site inserts"))
    if not isinstance(why, Refusal):
        return part
    if not edited and choice.policy not in sparse:
        raise _refused(choice.policy, site, why)
    (better,), _, _ = choose_kernels({site.id: kind}, replace(given, sizes={}))
    return part.with_choice(better).with_notes((f"{site.id}: {better.policy}, not {choice.policy}: {why}",))


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


def _check_sites(part: Plan, known: set[str], given: Circumstances) -> None:
    """Refuse a second choice for a site, and one for a site or size that is not there: none would be followed."""
    if part.split is not None and given.training:
        raise EffError("EFF-P506", "the plan splits a size, which needs two graphs: not where gradients flow")
    if part.split is not None and part.split.size not in given.sizes:
        raise unknown("EFF-P506", "size that the plan splits", part.split.size, given.sizes)
    for side in _sides(part):
        ids = [(choice.family, choice.site) for choice in part.within(side).choices if choice.family != "pass"]
        for number, (family, name) in enumerate(ids):
            if name not in known:
                raise unknown("EFF-P506", "site in a choice of the plan", name, known)
            if (family, name) in ids[:number]:
                what = "kernels" if family == KERNEL else "policies"
                raise EffError("EFF-P506", f"the plan has two {what} for it", site=name)


def _sides(part: Plan) -> tuple[Range, ...]:
    return ("any",) if part.split is None else ("below", "above")
