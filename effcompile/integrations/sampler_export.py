"""Export the denoiser of a sampler for the sizes of its schedule, with the schedule beside it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effcompile import ops
from effcompile.capture.export import capture_export
from effcompile.compiler import all_methods, compile_program
from effcompile.core.artifact import Manifest
from effcompile.core.dump import Dump
from effcompile.core.emitter import Say
from effcompile.core.errors import EffError
from effcompile.core.options import Options
from effcompile.core.policy import read_policy
from effcompile.core.program import Entry
from effcompile.core.schedule import Size
from effcompile.core.target import Target
from effcompile.exporting import export, load
from effcompile.integrations.replay import replayable
from effcompile.integrations.sampler_files import Loop, place_folder, process_json, word, write_loop
from effcompile.passes.attention.re_ttention import ReTtention
from effcompile.passes.attention.replay_portable import Carrying, replay_portable
from effcompile.passes.recognize.attention import Recognized
from effcompile.passes.unread_rows import DropUnreadRows
from effcompile.runtime.sampler import Sampler
from effcompile.targets.detect import detect_cpu


def export_sampler(
    sampler: Sampler,
    denoiser: Any,
    out: str | Path,
    batch: int,
    channels: int,
    args: Sequence[Tensor],
    *,
    to: str = "onnx",
    target: str | Sequence[str] | None = None,
    replay: str = "",
    force: bool = False,
    say: Say = lambda text: None,
) -> tuple[Manifest, ...]:
    """Write the folder that `load_sampler` reads, and return what the manifests of its artifacts say.

    Args:
        sampler: its schedule, process and conditions go with it.
        denoiser: the module that was not compiled.
        out: the folder. batch, channels, args: those of one call of the sampler.
        to, target: a form of `eff.export` that is run through files (`onnx`, `tensorrt-rtx`) and its chips.
        replay: `re-ttention{...}`: two graphs for each size, with its state as inputs and outputs.
        force: replace such a folder.

    Raises:
        EffError: EFF-E180 for what has no form in files: regions, a denoiser that fixes its size in a schedule of several,
            conditions beside a replay; else as `eff.export`.
    """
    if not isinstance(denoiser, nn.Module):
        raise EffError(
            "EFF-E180",
            "the denoiser is no module: regions and functions have no form in files",
            hint="eff.sampler(module, ...); a cache with region=output is part of the schedule",
        )
    caching = sampler.schedule.caching
    if caching is not None and caching.region == "body":
        raise EffError(
            "EFF-E180", "a cache of the body needs regions, which have no form in files", hint="region=output"
        )
    sizes = tuple(dict.fromkeys((sampler.schedule.sizes[-1], *sampler.schedule.sizes)))
    conditions = {size: dict(sampler.conditions(size)) if sampler.conditions else {} for size in sizes}
    names = tuple(conditions[sizes[0]])
    words = tuple(inspect.signature(denoiser.forward).parameters)[2 : 2 + len(args)]
    loop = Loop(
        sampler.schedule,
        channels,
        words,
        sampler.time_scale,
        process_json(sampler.trajectory.process),
        replay,
        names,
    )
    made: list[Manifest] = []

    def call(size: Size) -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(0)
        return torch.randn((batch, channels, *size), generator=draw), torch.linspace(0.2, 0.8, batch), *args

    def fill(folder: Path) -> None:
        more: dict[str, Any] = {"to": to, "target": target, "say": say}
        if replay:
            if names:
                raise EffError(
                    "EFF-E180",
                    "attention is replayed in graphs of one size, which take no conditions",
                    hint="export without attention=, or a denoiser of its latent and time alone",
                )
            policy = read_policy("attention", replay, all_methods())
            assert isinstance(policy, ReTtention), "the sampler checked it"
            for size in sizes:
                for name, graph in _pair(denoiser, policy, call(size)).items():
                    given = (*call(size), *graph.example)
                    made.append(export(graph, given, out=folder / f"{name}-{word(size)}", dynamic=False, **more))
        else:
            made.append(_whole(denoiser, call, conditions, folder / "denoiser", to, more))
        write_loop(folder, loop, {f"{word(s)}.{name}": x for s in conditions for name, x in conditions[s].items()})

    place_folder(Path(out), force, fill)
    return tuple(made)


def _whole(
    denoiser: nn.Module,
    call: Any,
    conditions: Mapping[Size, Mapping[str, Tensor]],
    out: Path,
    to: str,
    more: dict[str, Any],
) -> Manifest:
    """Export one model for all sizes, and hold it against eager in each of them."""
    first, *others = conditions
    names = tuple(inspect.signature(denoiser.forward).parameters)
    if to.startswith("tensorrt"):
        more = {**more, "profile": _profile(names[0], tuple(conditions))}
    manifest = export(denoiser, call(first), conditions[first], out=out, dynamic=bool(others), **more)
    latent = manifest.inputs[0]
    fixed = [n for n, size in enumerate(latent.shape[2:]) if not isinstance(size, str)]
    if others and any(other[n] != first[n] for n in fixed for other in others):
        raise EffError(
            "EFF-E180",
            f"the denoiser fixes its latent at {list(latent.shape)}, and the schedule has {len(others) + 1} sizes",
            hint="what depends on the size is computed from the latent's shape, or comes in by conditions=",
        )
    runner = load(out)
    for size in others:
        given = (*call(size), *conditions[size].values())
        with torch.no_grad():
            meant = denoiser(*call(size), **conditions[size])
        found = runner(dict(zip(runner.inputs, given, strict=True)))[runner.outputs[0]]
        error = float((found - meant).abs().max() / meant.abs().max())
        if found.shape != meant.shape or not error < 1e-3:
            raise EffError(
                "EFF-E110",
                f"at {word(size)} the export differs from eager by {error:.1e} of the largest value",
                hint="flavor='portable' has the most exact forms; eff repro MODEL names the rewrite that does it",
            )
    return manifest


def _profile(latent: str, sizes: Sequence[Size]) -> str:
    """Return a profile for each size: those edges of the latent that vary, each at one value, for which kernels are chosen."""
    places = [place for place in range(len(sizes[0])) if len({size[place] for size in sizes}) > 1]
    each = (
        ",".join(f"{latent}.{place + 2}={size[place]}:{size[place]}:{size[place]}" for place in places)
        for size in sizes
    )
    return ";".join(each) if places else ""


class CarriedGraph(nn.Module):
    """Be the denoiser in one phase, as a graph of standard operations: (arguments, state) -> (answer, state)."""

    def __init__(self, entry: Entry, example: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.graph, self.example = entry.graph, example
        self._held: list[str | None] = []
        for number, item in enumerate(entry.inputs):
            held = item.kind != "packed" and isinstance(item.value, Tensor)
            self._held.append(f"held_{number}" if held else None)
            if held:
                self.register_buffer(f"held_{number}", item.value.detach())

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Run it."""
        left = iter(given)
        values = [next(left) if name is None else getattr(self, name) for name in self._held]
        return tuple(self.graph(*values))


def _pair(denoiser: nn.Module, policy: ReTtention, args: tuple[Tensor, ...]) -> dict[Carrying, CarriedGraph]:
    """Return the graphs of both phases for a call."""
    ops.register()
    target, options = Target(detect_cpu(), "onnx"), Options(strict=True, disable=(DropUnreadRows.name,))
    made: dict[Carrying, CarriedGraph] = {}
    with torch.no_grad():
        program = capture_export(torch.export.export(denoiser, args, strict=False))
        phases: tuple[Carrying, ...] = ("refresh", "sparse")
        for phase in phases:
            example: list[Tensor] = []

            def storing(found: Recognized, phase: Carrying = phase, example: list[Tensor] = example) -> Any:
                changed, carried = replay_portable(found.program, replayable(found, policy), policy, phase)
                if phase == "sparse":
                    example += [x for one in carried for x in one.state(torch.device("cpu")).values()]
                gone = {one.site for one in carried}
                left = tuple(site for site in found.sites if site.id not in gone)
                return replace(found, program=changed, sites=left), (), ()

            compiled = compile_program(program, target, options, Dump(None), storing=storing)
            made[phase] = CarriedGraph(compiled.program.entries[0], tuple(example))
    return made
