"""Refuse a policy where choosing what to leave out takes longer than what it saves.

A policy that reads data (`Policy.chooses`) adds the work of its selector. At short lengths dense attention is faster, and who asks
for sparse attention must not get a slower model without a word. A site is refused where its lengths are known and the prices of
both sides can be compared: on CPUs, whose prices come from measured curves, and elsewhere where both are measured. Where a length
is a symbol the policy runs, and its reason in the plan says from which length on it pays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from effcompile.core.kernel import Supported
from effcompile.core.policy import Estimate, Policy
from effcompile.core.site import AttentionSite, Refusal

if TYPE_CHECKING:
    from effcompile.planning.planner import Circumstances

CODE = "EFF-A510"
_SHORTEST, _LONGEST = 1 << 8, 1 << 17


def unpaid(policy: Policy, proposal: Estimate, site: AttentionSite, given: Circumstances) -> Refusal | None:
    """Return why a proposal does not pay at a site, with the length from which on it does, or None."""
    if not policy.chooses or not isinstance(site.kv_len, int) or not isinstance(site.q_len, int):
        return None
    found = dense(site, given)
    if found is None:
        return None
    name, answer = found
    measured = proposal.tag == answer.tag == "measured"
    if proposal.seconds < answer.seconds or not (measured or given.target.device.kind == "cpu"):
        return None
    tag = "measured" if measured else "modelled"
    times = f"{proposal.seconds * 1e3:.3g} ms with its choice, {answer.seconds * 1e3:.3g} ms on {name} ({tag})"
    return Refusal(
        CODE,
        f"does not pay: {times}; {pays_from(policy, site, given)}",
        f'require={{"{policy.family}": 0}} runs it all the same',
    )


def symbolic_note(policy: Policy, site: AttentionSite, given: Circumstances) -> str:
    """Return from which length on a policy pays where the site's length is a symbol and prices can be compared, else nothing."""
    if not policy.chooses or isinstance(site.kv_len, int) or given.target.device.kind != "cpu":
        return ""
    return f"; {pays_from(policy, site, given)} (modelled)"


def dense(site: AttentionSite, given: Circumstances) -> tuple[str, Supported] | None:
    """Return the fastest exact kernel of a site and its price."""
    found = [(kernel.name, kernel.supports(site, given.target)) for kernel in given.kernels.exact]
    able = [(name, answer) for name, answer in found if isinstance(answer, Supported)]
    return min(able, key=lambda item: item[1].seconds, default=None)


def pays_from(policy: Policy, site: AttentionSite, given: Circumstances) -> str:
    """Tell the first power of two of keys, beyond those of the site, at which the policy is faster than dense attention."""
    square = str(site.q_len) == str(site.kv_len)
    length = 1 << (site.kv_len.bit_length() if isinstance(site.kv_len, int) else _SHORTEST.bit_length() - 1)
    while length <= _LONGEST:
        longer = replace(site, kv_len=length, q_len=length if square else site.q_len)
        proposal, other = policy.propose(longer, given.target, given.kernels), dense(longer, given)
        if isinstance(proposal, Estimate) and other is not None and proposal.seconds < other[1].seconds:
            return f"it pays from about {length:,} keys on"
        length *= 2
    return f"it pays at no length up to {_LONGEST:,} keys"
