"""Choose a dispatch for every mixture of experts; every refusal keeps its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from effcompile.core.errors import ContractError, EffError, unknown
from effcompile.core.experts import FAMILY, ExpertDispatch, MoESite
from effcompile.core.kernel import Supported
from effcompile.core.plan import Choice, Decline, Plan
from effcompile.core.site import Missed, Refusal
from effcompile.core.target import Target


def fingerprints(sites: Sequence[MoESite]) -> dict[str, str]:
    """Return what a plan is made for, by site."""
    return {site.id: site.fingerprint for site in sites}


def with_experts(
    plan: Plan,
    sites: Sequence[MoESite],
    missed: Sequence[Missed],
    target: Target,
    dispatches: Sequence[ExpertDispatch],
    asked: str = "",
) -> Plan:
    """Return the plan of one graph with the dispatch of every site: the cheapest, or the one that was asked for where it can.

    One that runs on request, and has no measured times here, comes behind all others.
    """
    if not sites and not missed:
        return plan
    choices: list[Choice] = []
    declined = [Decline(item.site.id, FAMILY, "raise", item.refusal, item.site.source) for item in missed]
    for site in sites:
        able: dict[str, Supported] = {}
        last: set[str] = set()
        for item in _of_its_kind(site, dispatches):
            answer = item.supports(site, target)
            if isinstance(answer, Refusal):
                declined.append(Decline(site.id, FAMILY, item.name, answer, site.source))
            else:
                able[item.name] = answer
                if item.on_request and answer.tag != "measured":
                    last.add(item.name)
        ranked = sorted(able, key=lambda name: (name != asked, name in last, able[name].seconds, name))
        assert ranked, f"nothing runs {site}"
        best, others = ranked[0], sorted(ranked[1:], key=lambda name: able[name].seconds)
        following = ", ".join(
            f"{name} {able[name].seconds * 1e3:.3g} ms{' on request' if name in last else ''}" for name in others
        )
        reason = ("as asked" if best == asked else "cheapest") + (f"; next {following}" if following else "")
        choices.append(Choice(site.id, FAMILY, best, reason, able[best].seconds, able[best].tag))
    *first, newest = plan.graphs
    made = replace(
        newest,
        choices=(*newest.choices, *choices),
        declined=(*newest.declined, *declined),
        fingerprints=tuple(sorted({**dict(newest.fingerprints), **fingerprints(sites)}.items())),
    )
    return replace(plan, graphs=(*first, made))


def _of_its_kind(site: MoESite, dispatches: Sequence[ExpertDispatch]) -> list[ExpertDispatch]:
    return [item for item in dispatches if item.capacity == bool(site.capacity)]


def replay_experts(part: Plan, sites: Sequence[MoESite], target: Target, dispatches: Sequence[ExpertDispatch]) -> Plan:
    """Return the part of a plan that was given, after a look at its dispatches; raise EFF-P506 for one that cannot be followed."""
    known: Mapping[str, ExpertDispatch] = {item.name: item for item in dispatches}
    for site in sites:
        choice, able = part.of(site.id, FAMILY), [item.name for item in _of_its_kind(site, dispatches)]
        if choice is None:
            raise EffError(
                "EFF-P506", "the plan has no dispatch for it", site=site.id, hint="eff plan MODEL -o plan.json"
            )
        if choice.policy not in able:
            raise unknown("EFF-P506", "dispatch in the plan", choice.policy, able, hint="eff show plan.json")
        why = known[choice.policy].supports(site, target)
        if isinstance(why, Refusal):
            raise EffError(
                "EFF-P506",
                f"the plan runs it with `{choice.policy}`, which cannot run it here: {why}",
                site=site.id,
                hint="eff plan MODEL -o plan.json",
            )
    return part


def check_asked(asked: str, dispatches: Sequence[ExpertDispatch]) -> None:
    """Raise EFF-U014 for a dispatch that does not exist."""
    names = [item.name for item in dispatches]
    if asked and asked not in names:
        raise unknown("EFF-U014", f"policy of family `{FAMILY}`", asked, names, hint="eff passes")


def keep_experts(require: Sequence[tuple[str, str]], sites: int, missed: Sequence[tuple[str, str, str]]) -> None:
    """Raise EFF-P502 unless as many mixtures of experts were raised as `require` asks for; missed ones are (place, source, why)."""
    wanted = dict(require).get(FAMILY)
    if wanted is None or (not missed if wanted == "all" else sites >= int(wanted)):
        return
    lines = "".join(f"\n  {place} ({source or 'no source'}): {why}" for place, source, why in missed)
    raise ContractError(
        "EFF-P502",
        f"`require` moe={wanted}: {sites} of {sites + len(missed)} mixtures of experts rewritten{lines}",
        hint="eff explain MODEL shows every reason; drop `require` to run anyway",
    )
