"""Ask a token policy about every stream of a graph: how many tokens are left behind each attention, or why all stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from effcompile.core.errors import ContractError, EffError
from effcompile.core.expr import BATCH, KEY, TRUE, axes_of
from effcompile.core.mask import Mask
from effcompile.core.plan import Choice, Decline, Plan
from effcompile.core.policy import read_policy
from effcompile.core.site import AttentionSite, Refusal
from effcompile.core.tokens import FAMILY, SCHEDULED, TokenReduction, behind


@dataclass(frozen=True)
class StreamSites:
    """Hold the sites of one stream in order, the operations that use a token's position, and whether keys are returned.

    `prefix` counts tokens in front that are the same for every input. `heads` says why heads cannot be cut, None where they can or
    where nobody asked.
    """

    sites: tuple[AttentionSite, ...]
    positions: tuple[str, ...] = ()
    returned: bool = False
    prefix: int = 0
    heads: Refusal | None = None


@dataclass(frozen=True)
class TokenPlan:
    """Hold what was decided: `sites` as they are on fewer tokens, and the policy behind each site that has one."""

    sites: tuple[AttentionSite, ...]
    policies: Mapping[str, TokenReduction]
    choices: tuple[Choice, ...] = ()
    declined: tuple[Decline, ...] = ()


@dataclass(frozen=True)
class _Counts:
    """Hold how many tokens and key heads are left behind each attention of a stream that has `tokens` and `heads`."""

    tokens: int
    heads: int
    left: tuple[int, ...]
    heads_left: tuple[int, ...]

    def reach(self, number: int) -> tuple[int, int]:
        """Return how many tokens and heads reach an attention."""
        return behind(number, self.left, self.tokens), behind(number, self.heads_left, self.heads)


Narrowing = Callable[[Mask, bool], Mask]


def policy_of(
    asked: TokenReduction | None, part: Plan | None, known: Iterable[type[TokenReduction]]
) -> TokenReduction | None:
    """Return the policy that is asked for, or one that a plan names, None where neither does."""
    if asked is not None or part is None:
        return asked
    named = next((c.policy for c in part.choices if c.family == FAMILY), None)
    return None if named is None else read_policy(FAMILY, named, known)


def plan_tokens(
    policy: TokenReduction,
    sites: Sequence[AttentionSite],
    streams: Sequence[StreamSites],
    refusals: Mapping[str, Refusal],
    training: bool,
    narrowing: Narrowing,
) -> TokenPlan:
    """Decide for every site; `narrowing` gives a mask over fewer tokens, of tokens that were merged or not.

    Raises:
        EffError: EFF-R110, EFF-R111 where the policy cannot be meant for the sequence.
    """
    by_id = {site.id: site for site in sites}
    policies: dict[str, TokenReduction] = {}
    choices: list[Choice] = []
    declined = [Decline(name, FAMILY, policy.spelled, why, by_id[name].source) for name, why in refusals.items()]
    asked = policy
    for stream in streams:
        policy = asked if asked.around else asked.holding(stream.prefix)
        why = _refusal(policy, stream, training)
        if why is not None:
            declined.extend(Decline(s.id, FAMILY, policy.spelled, why, s.source) for s in stream.sites)
            continue
        tokens, heads, many = _tokens(stream), _heads(policy, stream), len(stream.sites)
        counts = _Counts(tokens, heads, policy.counts(tokens, many), policy.head_counts(heads, many))
        policy.check_counts(tokens, counts.left)
        by_id.update(_narrowed(policy, stream, counts, narrowing))
        for number, site in enumerate(stream.sites):
            before, heads_before = (tokens, heads) if policy.around else counts.reach(number)
            left, heads_left = counts.left[number], counts.heads_left[number]
            if (left, heads_left) == (before, heads_before):
                told = Refusal(SCHEDULED, f"the schedule keeps its {before} tokens")
                declined.append(Decline(site.id, FAMILY, policy.spelled, told, site.source))
                continue
            policies[site.id] = policy.settled(left, heads_left if heads_left < heads else 0)
            reason = f"{before} -> {left} of {tokens} tokens"
            if heads_left < heads:
                reason += f", {heads_before} -> {heads_left} of {heads} key heads"
            choices.append(Choice(site.id, FAMILY, policies[site.id].spelled, reason))
    return TokenPlan(tuple(by_id[site.id] for site in sites), policies, tuple(choices), tuple(declined))


def replay_tokens(
    part: Plan | None,
    sites: Sequence[AttentionSite],
    streams: Sequence[StreamSites],
    training: bool,
    narrowing: Narrowing,
    known: Iterable[type[TokenReduction]],
) -> TokenPlan:
    """Follow the choices of a plan that was given; raise EFF-P506 for one that cannot be followed."""
    assert part is not None
    known = tuple(known)
    named = {c.site: read_policy(FAMILY, c.policy, known) for c in part.choices if c.family == FAMILY}
    by_id = {site.id: site for site in sites}
    placed: set[str] = set()
    for stream in streams:
        mine = [(site, named[site.id]) for site in stream.sites if site.id in named]
        if not mine:
            continue
        placed.update(site.id for site, _ in mine)
        policy = mine[0][1]
        for site, other in mine:
            if _unsettled(other) != _unsettled(policy):
                raise _unfit(site.id, f"two policies for one stream: `{policy.spelled}` and `{other.spelled}`")
        why = _refusal(policy, stream, training)
        if why is not None:
            raise _unfit(mine[0][0].id, f"the plan runs it with `{policy.spelled}`, which cannot run it here: {why}")
        counts = _replayed(policy, stream, named)
        policy.check_counts(counts.tokens, counts.left)
        by_id.update(_narrowed(policy, stream, counts, narrowing))
    for name in named:
        if name not in placed:
            raise _unfit(name, "it stands in no stream of tokens")
    return TokenPlan(tuple(by_id[site.id] for site in sites), named)


def _replayed(policy: TokenReduction, stream: StreamSites, named: Mapping[str, TokenReduction]) -> _Counts:
    """Return the counts that a plan names; raise EFF-P506 where they cannot be."""
    tokens, heads = _tokens(stream), _heads(policy, stream)
    left, heads_left, lefts, heads_lefts = tokens, heads, [], []
    for site in stream.sites:
        left = tokens if policy.around else left
        if site.id in named:
            now, many = named[site.id].left, named[site.id].heads_left or heads_left
            if many > heads_left or many < 0:
                raise _unfit(site.id, f"the plan leaves {many} of its {heads_left} key heads")
            most = left if many < heads_left else left - 1  # some tokens go, or some heads
            if not 0 < now <= most or now < left - named[site.id].most(left):
                raise _unfit(site.id, f"the plan leaves {now} of its {left} tokens")
            left, heads_left = now, many
        lefts.append(left)
        heads_lefts.append(heads_left)
    return _Counts(tokens, heads, tuple(lefts), tuple(heads_lefts))


def _unsettled(policy: TokenReduction) -> TokenReduction:
    return replace(policy, left=0, **({"heads_left": 0} if policy.heads_left else {}))  # type: ignore[type-var]


def _heads(policy: TokenReduction, stream: StreamSites) -> int:
    """Return the key heads of a stream, 1 for policies that leave heads alone."""
    heads = stream.sites[0].kv_heads
    return heads if policy.heads < 1 and isinstance(heads, int) else 1


def _unfit(site: str, reason: str) -> EffError:
    return EffError("EFF-P506", reason, site=site, hint="eff plan MODEL -o plan.json")


def _tokens(stream: StreamSites) -> int:
    tokens = stream.sites[0].q_len
    assert isinstance(tokens, int)
    return tokens


def _refusal(policy: TokenReduction, stream: StreamSites, training: bool) -> Refusal | None:
    if training:
        return Refusal("EFF-A301", "no gradient flows through this policy", "run inference under torch.no_grad()")
    if not policy.placed and stream.positions:
        return Refusal(
            "EFF-R107",
            f"a merged token has no position, and {stream.positions[0]} asks for it",
            "spatten drops tokens instead",
        )
    if stream.returned and not policy.cache:
        return Refusal(
            "EFF-R105",
            "keys or values of a layer are returned, and layers would have caches of different lengths",
            "use_cache=False, or cache=true in a policy that drops tokens",
        )
    if stream.returned and any(_pads(site.mask) for site in stream.sites):
        return Refusal(
            "EFF-R105", "keys of padded tokens would be returned, without the mask that hides them", "no padding"
        )
    if policy.heads < 1 and stream.heads is not None:
        return stream.heads
    for site in stream.sites:
        why = policy.refuses(site)
        if why is not None:
            return replace(why, reason=f"at {site.id}: {why.reason}")
    return None


def _pads(mask: object) -> bool:
    """Tell whether a mask hides keys whatever the query: padding, or what nobody can tell."""
    if not isinstance(mask, Mask):
        return True
    parts = mask.keep.args if mask.keep.op == "and" else (mask.keep,)
    return any(part != TRUE and axes_of(part) <= {BATCH, KEY} for part in parts)


def _narrowed(
    policy: TokenReduction, stream: StreamSites, counts: _Counts, narrowing: Narrowing
) -> dict[str, AttentionSite]:
    found = {}
    for number, site in enumerate(stream.sites):
        reach, heads = (counts.left[number], counts.heads) if policy.around else counts.reach(number)
        if reach != counts.tokens:
            weighed = policy.merges and not policy.around
            mask = narrowing(site.mask, weighed) if isinstance(site.mask, Mask) else site.mask
            site = replace(site, q_len=reach, kv_len=reach, mask=mask)
        if heads != counts.heads:
            assert isinstance(site.heads, int)
            site = replace(site, heads=site.heads // counts.heads * heads, kv_heads=heads)
        found[site.id] = site
    return found


def keep_tokens(require: Sequence[tuple[str, str]], plans: Sequence[Plan]) -> None:
    """Raise EFF-P502 unless streams were shortened behind as many attentions as `require` asks for."""
    wanted = dict(require).get(FAMILY)
    if wanted is None:
        return
    missed = [item for p in plans for item in p.declined if item.family == FAMILY and item.refusal.code != SCHEDULED]
    count = sum(choice.family == FAMILY for p in plans for choice in p.choices)
    if (wanted == "all" and (missed or not count)) or (wanted != "all" and count < int(wanted)):
        lines = "".join(f"\n  {m.site} ({m.source or 'no source'}): {m.refusal}" for m in missed)
        raise ContractError(
            "EFF-P502",
            f"`require` tokens={wanted}: shortened behind {count} attentions{lines}",
            hint="eff explain MODEL shows every reason; drop `require` to run anyway",
        )
