"""Choose a kernel for every site and the passes of every graph; every refusal keeps its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effcompile.core.errors import ContractError
from effcompile.core.kernel import AttentionKernel, Supported
from effcompile.core.plan import Choice, Decline, Plan
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
    kernels: Sequence[AttentionKernel],
    passes: Sequence[PassChoice],
    *,
    training: bool = False,
) -> Plan:
    """Return the plan for one target. With `training`, only kernels through which gradients flow are asked."""
    choices: list[Choice] = []
    declined: list[Decline] = []
    for site in sites:
        answers: list[tuple[float, AttentionKernel, Supported]] = []
        for kernel in kernels:
            if training and (why := kernel.gradient(site)) is not None:
                declined.append(Decline(site.id, KERNEL, kernel.name, why, site.source))
                continue
            answer = kernel.supports(site, target)
            if isinstance(answer, Supported):
                answers.append((answer.seconds, kernel, answer))
            else:
                declined.append(Decline(site.id, KERNEL, kernel.name, answer, site.source))
        assert answers, f"no kernel runs {site}"
        answers.sort(key=lambda item: (item[0], item[1].name))
        _, kernel, answer = answers[0]
        others = ", ".join(f"{k.name} {s * 1e3:.3g} ms" for s, k, _ in answers[1:])
        reason = f"mask {site.mask}" + (f"; next {others}" if others else "")
        choices.append(Choice(site.id, KERNEL, kernel.name, reason, answer.seconds, answer.tag))
    for item in missed:
        declined.append(Decline(item.site.id, "attention", "raise", item.refusal, item.site.source))
    for choice in passes:
        if choice.refusal is None:
            choices.append(Choice("graph", "pass", choice.name))
        else:
            declined.append(Decline("graph", "pass", choice.name, choice.refusal))
    prints = tuple(sorted((site.id, site.fingerprint) for site in sites))
    return Plan.single(str(target), choices, declined=tuple(declined), fingerprints=prints, training=training)


def keep_contract(plan: Plan, require: Sequence[tuple[str, str]], rewritten: int, missed: Sequence[Missed]) -> None:
    """Raise EFF-P502 unless as many sites were rewritten as `require` asks for; the error lists the missed ones."""
    for family, wanted in require:
        if family != "attention":
            continue
        short = (missed and wanted == "all") or (wanted != "all" and rewritten < int(wanted))
        if short:
            lines = "\n".join(f"  {m.site.id} ({m.site.source or 'no source'}): {m.refusal}" for m in missed)
            raise ContractError(
                "EFF-P502",
                f"`require` attention={wanted}: {rewritten} of {rewritten + len(missed)} sites rewritten\n{lines}",
                hint="eff explain MODEL shows every reason; drop `require` to run anyway",
            )
