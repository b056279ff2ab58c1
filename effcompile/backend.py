"""Be the backend of `torch.compile(model, backend="eff")`.

A rewrite that fails never costs the user the answer: the untouched graph goes to TorchInductor, with one warning and a counter;
`strict=True` raises instead. User errors (unknown options, a plan for another model, a broken contract) always raise.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from effcompile import report
from effcompile.capture.calls import called_path
from effcompile.capture.dynamo import CaptureRefused, capture_dynamo
from effcompile.codegen.by_size import Late, by_size
from effcompile.codegen.emit import emit_graph
from effcompile.codegen.interpreter import interpret_graph
from effcompile.compiler import (
    Compiled,
    asked_dispatch,
    asked_policies,
    asked_tokens,
    compile_program,
    own_caches,
    unprepared,
)
from effcompile.core.collector import paused
from effcompile.core.dump import Dump
from effcompile.core.errors import ContractError, EffError, RewriteError
from effcompile.core.experts import FAMILY
from effcompile.core.options import DOORS, Options
from effcompile.core.policy import SITE_FAMILIES
from effcompile.core.site import CacheSite
from effcompile.core.sizes import place_of_size, symbolic_sizes
from effcompile.core.target import Target
from effcompile.core.tokens import FAMILY as TOKENS
from effcompile.targets import devices
from effcompile.targets.detect import detect


class FallbackWarning(UserWarning):
    """Tell that a graph was compiled by TorchInductor without our rewrites."""


def eff(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. Options are listed in the README; unknown ones raise EFF-U001."""
    return compile_dynamo(gm, example_inputs, Options.parse(options, mode))


def backend(mode: str | None = None, **options: Any) -> Callable[..., Any]:
    """Return a backend with its options bound: `torch.compile(model, backend=eff.backend(plan="plan.json"))`.

    Two backends with equal decisions compare equal, so that neither recompiles the other's code; any other option recompiles.
    """
    return _Bound(Options.parse(options, mode))


class _Bound:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.__name__ = f"eff_{options.digest}"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
        if given.get("options") or given.get("mode"):
            raise EffError(
                "EFF-U012", "this backend has its options already", hint="give all of them to eff.backend(...)"
            )
        return compile_dynamo(gm, example_inputs, self.options)

    def reset(self) -> None:
        """Forget the reports, as `torch._dynamo.reset()` asks every backend to do."""
        reset()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bound) and other.options.digest == self.options.digest

    def __hash__(self) -> int:
        return hash(self.options.digest)


def compile_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compile a graph as the options say, with the fallbacks described above."""
    check_doors(options, lambda: _own_caches(gm, example_inputs))
    try:
        with paused(), report.timed() as clock:
            program = capture_dynamo(gm, example_inputs)
            inside = unprepared(program)
            if inside is not None:
                path = ".".join(part for part in (called_path(), inside) if part)
                report.looped(path, program.breaks[0].source)
            target = target_of(options, program.device)
            clock.lap("capture")
            compiled = compile_program(program, target, options, _dump(), _fuel())
            clock.add(compiled.seconds)
            (entry,) = compiled.program.entries
            run = _by_size(emit_graph(entry.graph, example_inputs, options), compiled, options)
            clock.lap("emit")
    except ContractError:
        raise
    except CaptureRefused as refusal:
        report.refused(refusal)
        return emit_graph(gm, example_inputs, options)
    except EffError as error:
        if error.exit_code != 4 or options.strict:
            raise
        return _fallback(gm, example_inputs, options, error)
    except torch._dynamo.exc.RestartAnalysis:
        raise  # no failure: Dynamo traces the frame again with what TorchInductor found out about its scalars
    except Exception as error:
        if options.strict:  # Dynamo would turn some of torch's own exceptions into a silent graph break
            raise RewriteError("EFF-X900", f"{type(error).__name__}: {error}") from error
        return _fallback(gm, example_inputs, options, error)
    report.compiled(compiled, clock.parts)
    return _guarded(run, compiled, gm, example_inputs, options)


def _by_size(run: Callable[..., Any], compiled: Compiled, options: Options) -> Callable[..., Any]:
    """Let a plan's split size decide between this range's callable and the other's, which is compiled when it is met."""
    split, other = compiled.plan.split, compiled.other
    if split is None or other is None:
        return run
    (entry,) = compiled.program.entries
    place = place_of_size(entry.graph.graph, split.size)
    assert place is not None, f"no input has the size {split.size}"

    def failed(error: Exception) -> None:
        if options.strict:
            raise RewriteError("EFF-X900", f"{type(error).__name__}: {error}") from error
        report.failed(error)

    hint = symbolic_sizes(entry.graph.graph)[split.size].hint
    late = Late(lambda: other().entries[0].graph, options)
    return by_size(run, late, split, place, hint, compiled=report.second_range, failed=failed)


def _guarded(
    run: Callable[..., Any], compiled: Compiled, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    """Wrap the compiled function so that a proof that relied on a buffer's content is checked before every call."""
    names = [item.node for item in compiled.program.entries[0].inputs]
    watched = [(names.index(name), example_inputs[names.index(name)]) for name in compiled.pinned]
    if not watched:
        return run
    stamps = [(place, value.data_ptr(), value._version) for place, value in watched]
    spare: list[Callable[..., Any]] = []

    def checked(*args: Any) -> Any:
        if all(
            args[place].data_ptr() == pointer and args[place]._version == version for place, pointer, version in stamps
        ):
            return run(*args)
        if not spare:
            called = {item.node: item.name for item in compiled.program.entries[0].inputs}
            report.stale(tuple(called[node] for node in compiled.pinned))
            spare.append(_unproved(gm, options))
        return spare[0](*args)

    return checked


def _unproved(gm: fx.GraphModule, options: Options) -> Callable[..., Any]:
    """Return the graph as it was given, op by op: outside Dynamo no graph of symbolic sizes can be compiled.

    A FlexAttention call must be compiled, for op by op it does not look at its block lists: once for every set of sizes.
    """
    if not any(str(getattr(node.target, "_name", "")) == "flex_attention" for node in gm.graph.nodes):
        return interpret_graph(gm)
    made: dict[Any, Callable[..., Any]] = {}

    def run(*args: Any) -> Any:
        sizes = tuple((*x.shape, *x.stride()) if isinstance(x, torch.Tensor) else x for x in args)
        if sizes not in made:
            made[sizes] = emit_graph(gm, args, options)
        return made[sizes](*args)

    return run


def _fallback(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, error: Exception
) -> Callable[..., Any]:
    report.failed(error)
    text = f"{type(error).__name__}: {error}"
    warnings.warn(f"effcompile: {text}; this graph runs on TorchInductor unchanged", FallbackWarning, stacklevel=2)
    return emit_graph(gm, example_inputs, options)


def check_doors(options: Options, own: Callable[[], Sequence[CacheSite]] = tuple) -> None:
    """Raise EFF-U013, or EFF-U014 and its kin, for a family that a compiled graph cannot reach or that no policy answers.

    `own` finds the caches that are buffers of the model itself. Those have a door of their own: a graph cannot store them
    otherwise, since it cannot know who else reads them. Graphs of other shapes, code between two graphs, `state_dict` and
    whoever empties the cache see the buffers of the module, and would see what the model has not written.
    """
    for family, spelled in options.families:
        if family in ("kv", "evict") and (sites := own()):
            one, count = sites[0], f"{len(sites)} caches are" if len(sites) > 1 else "the cache is"
            raise EffError(
                "EFF-U013",
                f"torch.compile cannot apply {family}={spelled}: {count} in buffers of the model ({one.id}), which code outside of "
                "the graph reads and writes as well",
                source=one.source or None,
                hint='use eff.prepare(torch.export.export(model, inputs), kv="..."): a module that owns its caches, and keeps all '
                "tokens; torch.compile takes it",
            )
        if family in DOORS:
            raise EffError("EFF-U013", f"torch.compile cannot apply {family}={spelled}", hint=f"use {DOORS[family]}")
        if family not in (*SITE_FAMILIES, FAMILY, TOKENS):
            raise EffError(
                "EFF-U014", f"no policy of family `{family}` is installed (asked for {spelled})", hint="eff passes"
            )
    asked_policies(options)
    asked_tokens(options)
    asked_dispatch(options)


def _own_caches(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Sequence[CacheSite]:
    try:
        return own_caches(capture_dynamo(gm, example_inputs))
    except Exception:  # an error is on its way, which names the other door then
        return ()


def target_of(options: Options, device: str) -> Target:
    """Return the asked-for target, else this machine's for the device of the inputs."""
    if options.target is not None:
        return Target.parse(options.target, devices())
    return detect(device)


def _dump() -> Dump:
    folder = os.environ.get("EFF_DUMP")
    return Dump(Path(folder) / f"graph{report.count():02d}" if folder else None)


def _fuel() -> int | None:
    fuel = os.environ.get("EFF_FUEL")
    return int(fuel) if fuel else None


def reset() -> None:
    """Forget the reports; Dynamo calls this on `torch._dynamo.reset()`."""
    report.clear()


eff.reset = reset  # type: ignore[attr-defined]
