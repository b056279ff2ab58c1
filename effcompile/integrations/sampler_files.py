"""Write a sampler to files that run without its model, and read it again: the denoiser exported, the schedule as JSON beside it.

DIR/schedule.json            what the loop does, and the hash of everything beside it
DIR/conditions.safetensors   arguments of the denoiser that depend on the size, where there are any
DIR/denoiser/                an artifact of `eff export`, for every size of the schedule
DIR/refresh/, DIR/sparse/    in its place where attention is replayed: its state goes in and out (one pair a size)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effcompile.compiler import all_methods
from effcompile.core.artifact import AGAIN
from effcompile.core.emitter import Runner
from effcompile.core.errors import EffError
from effcompile.core.policy import read_policy
from effcompile.core.schedule import Schedule, Size
from effcompile.exporting import load
from effcompile.passes.attention.re_ttention import ReTtention
from effcompile.runtime.processes import DiffusionProcess, VariancePreserving
from effcompile.runtime.replayed import Phases, ReplayedDenoiser
from effcompile.runtime.sampler import Sampler

SCHEDULE, CONDITIONS, SCHEMA = "schedule.json", "conditions.safetensors", 1


@dataclass(frozen=True)
class Loop:
    """Hold what `schedule.json` says: `arguments` name what the denoiser takes behind latent and time."""

    schedule: Schedule
    channels: int
    arguments: tuple[str, ...] = ()
    time_scale: float = 1.0
    process: Mapping[str, Any] | None = None
    replay: str = ""
    conditions: tuple[str, ...] = ()

    def to_json(self, hashes: Mapping[str, str]) -> dict[str, Any]:
        """Return JSON values; floats are exact."""
        return {
            "schema": SCHEMA,
            "schedule": self.schedule.to_json(),
            "channels": self.channels,
            "arguments": list(self.arguments),
            "time_scale": self.time_scale,
            "process": self.process,
            "replay": self.replay,
            "conditions": list(self.conditions),
            "hashes": dict(hashes),
        }


def process_json(process: DiffusionProcess) -> dict[str, Any] | None:
    """Return a variance preserving process as JSON values, None for flow matching.

    Raises:
        EffError: EFF-E180 for a process of another kind.
    """
    if isinstance(process, VariancePreserving):
        alphas = process.alphas.double().tolist()
        wide = process.alphas.dtype == torch.float64
        return {"alphas": alphas, "wide": wide, "prediction": process.prediction, "mixed": process.mixed}
    if type(process).__name__ != "FlowMatching":
        raise EffError(
            "EFF-E180",
            f"a schedule file has no form for the process {type(process).__name__}",
            hint="FlowMatching and VariancePreserving have one; run others with eff.sampler",
        )
    return None


def word(size: Size) -> str:
    """Return a size as files are named by it."""
    return "x".join(map(str, size))


def write_loop(folder: Path, loop: Loop, conditions: Mapping[str, Tensor]) -> None:
    """Write what lies beside the artifacts of a folder."""
    if conditions:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in conditions.items()}, folder / CONDITIONS)
    (folder / SCHEDULE).write_text(json.dumps(loop.to_json(_hashes(folder)), indent=1) + "\n", encoding="utf-8")


def _hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each artifact's manifest, which has those of its files, and of the conditions."""
    files = [*sorted(folder.glob("*/manifest.json")), *folder.glob(CONDITIONS)]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def place_folder(out: Path, force: bool, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside `out` and give it that name when it is whole.

    Raises:
        EffError: EFF-E101 where something is at `out`, unless `force` is given and it is such a folder.
    """
    if out.exists() and not (force and (out / SCHEDULE).is_file()):
        raise EffError("EFF-E101", f"{out} is there already", hint="--force replaces an exported sampler")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        fill(draft)
        draft.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_loop(folder: Path) -> Loop:
    """Read and check `schedule.json`.

    Raises:
        EffError: EFF-E102 where there is none, EFF-E105 where a file beside it is not the one that it was written with, EFF-D105
            for anything that is no schedule.
    """
    path = folder / SCHEDULE
    if not path.is_file():
        raise EffError("EFF-E102", f"{folder} is no exported sampler: it has no {SCHEDULE}", hint="sampler.export(...)")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise ValueError(f"schema {raw['schema']}")
        loop = Loop(
            Schedule.from_json(raw["schedule"]),
            int(raw["channels"]),
            tuple(map(str, raw["arguments"])),
            float(raw["time_scale"]),
            raw["process"],
            str(raw["replay"]),
            tuple(map(str, raw["conditions"])),
        )
        hashes = dict(raw["hashes"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise EffError("EFF-D105", f"{path.name} is no schedule of a sampler: {error!r}", hint=AGAIN) from error
    if (found := _hashes(folder)) != hashes:
        odd = sorted(name for name in {*found, *hashes} if found.get(name) != hashes.get(name))
        raise EffError("EFF-E105", f"{', '.join(odd)}: not what {path.name} was written with", hint=AGAIN)
    return loop


def load_sampler(
    path: str | Path, *, provider: str = "cpu", threads: int | None = None, trust: bool = False
) -> Sampler:
    """Return the sampler of a folder that `sampler.export` wrote; its denoiser is the exported one.

    Raises:
        EffError: as `read_loop` and `eff.load`.
    """
    folder = Path(path)
    loop = read_loop(folder)

    def runner(name: str) -> Runner:
        return load(folder / name, provider=provider, threads=threads, trust=trust)

    conditions: dict[str, Tensor] = {}
    if loop.conditions:
        from safetensors.torch import load_file

        conditions = load_file(folder / CONDITIONS)

    def of(size: Size) -> dict[str, Tensor]:
        return {name: conditions[f"{word(size)}.{name}"] for name in loop.conditions}

    denoiser: Any
    if loop.replay:
        denoiser = _replayed(loop, runner)
    else:
        whole = runner("denoiser")

        def denoiser(latent: Tensor, time: Tensor, *args: Tensor, **more: Tensor) -> Tensor:
            given = (latent, time, *args, *(more[name] for name in loop.conditions))
            return whole(dict(zip(whole.inputs, given, strict=True)))[whole.outputs[0]]

    return Sampler(
        denoiser,
        loop.schedule,
        process=_process(loop),
        time_scale=loop.time_scale,
        conditions=of if loop.conditions else None,
    )


def _process(loop: Loop) -> DiffusionProcess | None:
    raw = loop.process
    if raw is None:
        return None
    dtype = torch.float64 if raw["wide"] else torch.float32
    return VariancePreserving(torch.tensor(raw["alphas"], dtype=dtype), raw["prediction"], raw["mixed"])


def _replayed(loop: Loop, runner: Callable[[str], Runner]) -> ReplayedDenoiser:
    """Return a denoiser of two graphs a size; a dense step is a refresh whose state nobody reads."""
    policy = read_policy("attention", loop.replay, all_methods())
    assert isinstance(policy, ReTtention), "the file names a policy that is replayed"

    def build(args: tuple[Any, ...]) -> Phases:
        size = tuple(args[0].shape[2:])
        refresh, sparse = (runner(f"{name}-{word(size)}") for name in ("refresh", "sparse"))
        state: dict[str, Tensor] = {}

        def refreshed(held: Mapping[str, Tensor], given: Sequence[Any]) -> Tensor:
            found = refresh(dict(zip(refresh.inputs, given, strict=True)))
            answer, *fresh = (found[name] for name in refresh.outputs)
            state.update({str(n): value for n, value in enumerate(fresh)})
            return answer

        def banded(held: Mapping[str, Tensor], given: Sequence[Any]) -> Tensor:
            kept = [state[str(n)] for n in range(len(state))]
            found = sparse(dict(zip(sparse.inputs, (*given, *kept), strict=True)))
            answer, *grown = (found[name] for name in sparse.outputs)
            state.update({str(2 * n): rho for n, rho in enumerate(grown)})  # residuals stay
            return answer

        return Phases({"dense": refreshed, "refresh": refreshed, "sparse": banded}, state)

    return ReplayedDenoiser(policy.phase, build)
