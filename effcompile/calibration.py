"""Choose a policy for each layer from samples: the one that leaves out the most at an error that was measured.

The model runs dense on some samples. At each attention site every candidate policy is asked for its map on the true q and k, and
what it would keep is recorded: density, kept mass, a bound of the error, and the relative L2 error of the site's output. A site
gets the candidate with the smallest density whose worst error stays within the tolerance, or stays dense. The record is JSON, keyed
by a hash of the model's weights and by the lengths, each rounded up to a power of two; with another model or length it is refused.
Policies that drop tokens instead of blocks (`zipvl`) are left out: their outputs have no mass to compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from effcompile import skeleton as skeletons
from effcompile.backend import target_of
from effcompile.compiler import all_policies, catalog, compile_program
from effcompile.core.errors import EffError
from effcompile.core.expr_eval import to_json
from effcompile.core.mask import Mask
from effcompile.core.options import Options
from effcompile.core.plan import Choice, GraphPlan
from effcompile.core.policy import Estimate, Policy, read_policy
from effcompile.core.site import AttentionSite, place
from effcompile.core.target import Target
from effcompile.explaining import explain
from effcompile.observe import observe
from effcompile.ops.kept_mass import Kept, kept_mass
from effcompile.planning.ledger import Recording

SCHEMA = 1
TOLERANCE = 0.05
"""Allow this relative L2 error of a site's output, until a measurement of the model says otherwise."""
_BLOCK = 128
_RAISED = "eff::attention_v1"
_BLOCKS = "eff::attention_blocks_v1"


@dataclass(frozen=True)
class Measured:
    """Hold what a policy does at a site, over all samples: means of density and kept mass, the worst of the others."""

    site: str
    policy: str
    density: float
    mass: float
    least_mass: float
    bound: float
    error: float
    samples: int


@dataclass(frozen=True)
class Calibration:
    """Hold the record: `model` is the hash of the weights, `bucket` the lengths that it holds for."""

    model: str
    bucket: tuple[tuple[int, int], ...]
    tolerance: float
    rows: tuple[Measured, ...]

    def choice(self, site: str) -> Measured | None:
        """Return the policy with the smallest density whose error is within the tolerance, or None: dense."""
        able = [row for row in self.rows if row.site == site and row.error <= self.tolerance and row.density < 1]
        return min(able, key=lambda row: (row.density, row.error), default=None)

    def options(self, model: nn.Module, *inputs: Any, force: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Return the options of `torch.compile(model, backend="eff", options=...)` that run the calibrated policies.

        Raises:
            EffError: EFF-P508 where the model or the lengths are not those of the record, unless forced.
        """
        plan = explain(model, *inputs, **kwargs).plan
        if not force:
            self._check(model, inputs, kwargs)
        return {"plan": replace(plan, graphs=tuple(map(self._planned, plan.graphs)))}

    def _check(self, model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if (found := fingerprint(model)) != self.model:
            raise EffError(
                "EFF-P508",
                f"calibrated for weights {self.model}, and these are {found}",
                hint="calibrate again, or force=True",
            )
        here = buckets(
            site for _, _, sites in _raised(model, inputs, kwargs, target_of(Options(), "cpu")) for site in sites
        )
        if here != self.bucket:
            raise EffError(
                "EFF-P508",
                f"calibrated for (queries, keys) up to {self.bucket}, and these are {here}",
                hint="calibrate with samples of this length, or force=True",
            )

    def _planned(self, part: GraphPlan) -> GraphPlan:
        made = [choice for choice in part.choices if choice.family != "attention"]
        for site in dict(part.fingerprints):
            row = self.choice(part.paths(site)[0])
            if row is not None:
                reason = (
                    f"calibrated: density {row.density:.3g}, relative error {row.error:.2g} over {row.samples} samples"
                )
                made.append(Choice(site, "attention", row.policy, reason))
        return replace(part, choices=tuple(made))

    def to_json(self) -> str:
        """Return the record as JSON text."""
        told = {"schema": SCHEMA, "model": self.model, "bucket": self.bucket, "tolerance": self.tolerance}
        return json.dumps({**told, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> Calibration:
        """Read a record from a file; raises EFF-P508 where it is none."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            assert raw["schema"] == SCHEMA
            rows = tuple(Measured(**row) for row in raw["rows"])
            bucket = tuple((int(queries), int(keys)) for queries, keys in raw["bucket"])
            return cls(str(raw["model"]), bucket, float(raw["tolerance"]), rows)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise EffError("EFF-P508", f"{path} is no calibration: {type(error).__name__}: {error}") from error


def calibrate(
    model: nn.Module,
    samples: Iterable[tuple[Any, ...]],
    policies: Sequence[str],
    *,
    tolerance: float = TOLERANCE,
    progress: Callable[[str], None] = lambda text: None,
    **kwargs: Any,
) -> Calibration:
    """Run the model dense on samples (tuples of arguments of equal shapes) and record what each policy would do at each site.

    `policies` are spelled as in the options (`xattention{threshold=0.9}`); 8 to 32 samples are usual. `kwargs` go to every call.

    Raises:
        EffError: EFF-U014, EFF-U003, EFF-U004 for a policy that is misspelled; EFF-P508 without samples.
    """
    asked = [read_policy("attention", text, all_policies()) for text in policies]
    found: dict[tuple[str, str], list[Kept]] = {}
    seen: tuple[tuple[int, int], ...] = ()
    for number, sample in enumerate(samples):
        progress(f"sample {number + 1}")
        with torch.no_grad():
            target = target_of(Options(), "cpu")
            graphs = list(_raised(model, sample, kwargs, target))
            seen = buckets(site for _, _, sites in graphs for site in sites)
            for graph, inputs, sites in graphs:
                _Reader(graph, sites, asked, target, found).run(*inputs)
    if not seen:
        raise EffError("EFF-P508", "no sample with an attention site was given")
    rows = tuple(_measured(site, policy, kept) for (site, policy), kept in found.items())
    return Calibration(fingerprint(model), seen, tolerance, rows)


def _measured(site: str, policy: str, found: Sequence[Kept]) -> Measured:
    count = len(found)
    return Measured(
        site,
        policy,
        density=sum(kept.density for kept in found) / count,
        mass=sum(float(kept.mass.mean()) for kept in found) / count,
        least_mass=min(float(kept.mass.min()) for kept in found),
        bound=max(float(kept.bound.max()) for kept in found),
        error=max(kept.error for kept in found),
        samples=count,
    )


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's weights and buffers: names, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def buckets(sites: Iterable[AttentionSite]) -> tuple[tuple[int, int], ...]:
    """Return the (queries, keys) of sites, each rounded up to a power of two, once each."""
    return tuple(sorted({(_rounded(site.q_len), _rounded(site.kv_len)) for site in sites}))


def _rounded(length: int | str) -> int:
    return 1 << (length - 1).bit_length() if isinstance(length, int) and length > 0 else 0


def _raised(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], target: Target
) -> Iterable[tuple[fx.GraphModule, tuple[Any, ...], tuple[AttentionSite, ...]]]:
    """Yield each graph with its attention raised, its inputs, and its sites, whose ids are their places in the module tree."""
    for graph in observe(skeletons.real(model, inputs, dict(kwargs)), dynamic=False, keep_inputs=True).graphs:
        if graph.program is None:
            continue
        recording = Recording(None)
        compiled = compile_program(graph.program, target, Options(), recording)
        program = dict(recording.stages)["recognized"]
        sites = tuple(replace(site, entry=place(graph.owner, site.id)) for site in compiled.sites)
        for entry in program.entries:
            yield entry.graph, tuple(graph.inputs), sites


class _Direct:
    """Run what a policy would insert into a graph."""

    def call(self, target: Callable[..., Tensor], *operands: Any, **rest: Any) -> Tensor:
        return target(*operands)


class _Reader(fx.Interpreter):  # type: ignore[misc]  # torch is Any here
    def __init__(
        self,
        graph: fx.GraphModule,
        sites: Sequence[AttentionSite],
        policies: Sequence[Policy],
        target: Target,
        into: dict[tuple[str, str], list[Kept]],
    ) -> None:
        super().__init__(graph)
        self.sites, self.policies, self.target, self.into = {s.id: s for s in sites}, policies, target, into
        self.kernels = catalog()

    def run_node(self, n: fx.Node) -> Any:
        site = self.sites.get(n.meta.get("eff.site", ""))
        if site is not None and str(getattr(n.target, "_schema", "")).startswith(_RAISED):
            operands, _ = self.fetch_args_kwargs_from_env(n)
            for policy in self.policies:
                if isinstance(policy.propose(site, self.target, self.kernels), Estimate) and policy.op in (
                    _RAISED,
                    _BLOCKS,
                ):
                    kept = _kept(policy, site, operands)
                    self.into.setdefault((site.entry, policy.settled().spelled), []).append(kept)
        return super().run_node(n)


def _kept(policy: Any, site: AttentionSite, operands: Sequence[Any]) -> Kept:
    """Return what a policy keeps of one call; `operands` are those of `eff::attention_v1`."""
    q, k, v, _, _, loads, sizes, keep, _, _, empty_row, scale, _ = operands
    after = policy.narrowed(site)
    assert isinstance(after.mask, Mask)
    if policy.op == _RAISED:
        blocks, narrowed = (_BLOCK, _BLOCK), to_json(after.mask.keep)
        chosen = torch.ones(
            (1, 1, -(-q.shape[2] // _BLOCK), -(-k.shape[2] // _BLOCK)), dtype=torch.bool, device=q.device
        )
    else:
        blocks, narrowed = policy.blocks(site), keep
        chosen = policy.map(SimpleNamespace(scale=scale), (q, k, list(loads), list(sizes), keep), site, _Direct())
    return kept_mass(q, k, v, chosen, narrowed, list(loads), list(sizes), keep, empty_row, scale, blocks)
