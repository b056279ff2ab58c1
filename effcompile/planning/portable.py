"""Follow a plan that was made for another target: the same decisions where this one has them, and a name for every other.

Kernels of torch.compile are none of a runtime's, so that a site's kernel gives way to another exact one (`substituted`). A policy
that is the same at every site is asked for again; policies that differ from site to site are not followed (`dropped`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from effcompile.core.artifact import SiteForm
from effcompile.core.errors import EffError
from effcompile.core.plan import Choice, Plan
from effcompile.core.policy import SITE_FAMILIES

WRAPPER = "model."
"""What the id of a site begins with where a decoder was wrapped to hand out its cache."""


def policies(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Return (family, policy) of every family of policies that a plan follows at all of its sites in one way."""
    found: dict[str, dict[str, str]] = {}
    sites = {choice.site for graph in plan.graphs for choice in graph.choices if choice.family == "attention-kernel"}
    for graph in plan.graphs:
        for choice in graph.choices:
            if choice.family in SITE_FAMILIES:
                found.setdefault(choice.family, {})[choice.site] = choice.policy
    return tuple(
        (family, next(iter(of.values())))
        for family, of in found.items()
        if len(set(of.values())) == 1 and set(of) == sites
    )


def followed(plan: Plan, forms: Sequence[SiteForm], families: Sequence[str]) -> tuple[SiteForm, ...]:
    """Return what became of every site, seen from a plan; `forms` are what was chosen here, `families` the policies asked for.

    Raises:
        EffError: EFF-E120 where the plan knows none of the sites.
    """
    wanted: dict[str, list[Choice]] = {}
    for graph in plan.graphs:
        for choice in graph.choices:
            wanted.setdefault(choice.site, []).append(choice)
    known = {form.site: _of(form.site, wanted) for form in forms}
    if forms and not any(known.values()):
        raise EffError(
            "EFF-E120",
            f"the plan has no site of this model; one here is {forms[0].site}",
            hint="eff plan MODEL -o plan.json",
        )
    found: list[SiteForm] = []
    for form in forms:
        kernels = [c.policy for c in known[form.site] if c.family not in SITE_FAMILIES]
        if form.status == "same" and kernels and form.form not in kernels:
            form = replace(form, status="substituted", reason=f"the plan has {', '.join(kernels)}; {form.reason}")
        found.append(form)
    for site, choices in sorted((form.site, known[form.site]) for form in forms):
        for choice in choices:
            if choice.family in SITE_FAMILIES and choice.family not in families:
                found.append(
                    SiteForm(site, "dropped", choice.policy, "EFF-E120 the plan has other policies at other sites")
                )
    return tuple(dict.fromkeys(found))


def _of(site: str, wanted: dict[str, list[Choice]]) -> list[Choice]:
    return wanted.get(site) or wanted.get(site.removeprefix(WRAPPER)) or []
