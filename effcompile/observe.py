"""Run a model once through Dynamo and keep the graphs it was cut into, without compiling any.

Used by everything that looks before it leaps: `explain`, `plan`, the error ledger and the bisection. The frames are
traced in a cache of their own where torch has one, so that a later `torch.compile` of the same code neither reuses nor
counts them.
"""

from __future__ import annotations

import inspect
import logging
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from effcompile.capture.dynamo import CaptureRefused, capture_dynamo, module_of, module_path
from effcompile.capture.export import capture_export
from effcompile.core.errors import EffError
from effcompile.core.program import Break, Input, Program
from effcompile.modules import attention_modules
from effcompile.skeleton import Skeleton

_QUOTED = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass
class SeenGraph:
    """Hold one graph of Dynamo: the captured program, or the refusal, and the modules that it was run for.

    `inputs` are the example inputs as they were before the run. `owners` are the paths of the modules whose parameters
    the graph was called with, one a call: after a graph break one graph serves every layer of the same code.
    """

    program: Program | None
    refusal: EffError | None
    inputs: tuple[Any, ...]
    nodes: int
    breaks: tuple[Break, ...]
    owners: list[str] = field(default_factory=list)

    @property
    def owner(self) -> str:
        """Return the module of the first call ('' for a graph of the whole model)."""
        return self.owners[0] if self.owners else ""


@dataclass(frozen=True)
class Stop:
    """Say where a run ended early, and why (a value was asked of a tensor that has none)."""

    reason: str
    source: str
    module: str = ""


@dataclass(frozen=True)
class Observation:
    """Hold the graphs in order, the paths of modules that ran (all of attention), and where the traced run stopped.

    `partial` tells that the eager run failed where the traced one did not, so that `called` may lack some: fake tensors
    lack an implementation of some ops that Dynamo replaces.
    """

    graphs: tuple[SeenGraph, ...]
    called: frozenset[str]
    stop: Stop | None = None
    partial: bool = False


def observe(skeleton: Skeleton, *, dynamic: bool | None = None, keep_inputs: bool = False) -> Observation:
    """Trace a model by running it through Dynamo, without gradients.

    Where that leaves a module that looks like attention unaccounted for, or stops early, an eager run on fresh arguments
    notes which modules are called. `keep_inputs` copies the inputs of every graph as they were before it ran.
    """
    model = skeleton.model
    paths = _paths_of_tensors(model)
    graphs: list[SeenGraph] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kept = tuple(_kept(value) for value in example_inputs) if keep_inputs else tuple(example_inputs)
        program: Program | None = None
        refusal: EffError | None = None
        try:
            program = _with_contents(capture_dynamo(gm, example_inputs), skeleton.origins)
        except CaptureRefused as error:
            refusal = error
        except Exception as error:
            refusal = EffError("EFF-G399", f"capture failed: {type(error).__name__}: {error}", hint="report it, please")
        graph = SeenGraph(program, refusal, kept, len(gm.graph.nodes), _breaks(gm, program))
        names = [_local_name(node) for node in gm.graph.nodes if node.op == "placeholder"]
        graphs.append(graph)

        def run(*args: Any) -> Any:
            graph.owners.append(_owner(names, args, paths))
            return gm.forward(*args)

        return run

    stop = _run(_traced(model, record, dynamic), skeleton)
    called = _traced_modules(graphs)
    if stop is None and called.issuperset(path for path, _ in attention_modules(model)):
        return Observation(tuple(graphs), called)
    seen, eager_stop = _called(skeleton)
    if stop is not None and eager_stop is not None:
        stop = eager_stop  # the model fails by itself: its own stack says more than Dynamo's
    return Observation(tuple(graphs), called | seen, stop, eager_stop is not None and stop is None)


def observe_export(exported: torch.export.ExportedProgram) -> Observation:
    """Return the one graph of an exported program; its module tree is gone, so nothing is counted against it."""
    with torch.no_grad():
        program = capture_export(exported)
    inputs = tuple(item.value for item in program.entries[0].inputs)
    nodes = len(program.entries[0].graph.graph.nodes)
    return Observation((SeenGraph(program, None, inputs, nodes, (), [""]),), frozenset())


def _traced_modules(graphs: Sequence[SeenGraph]) -> frozenset[str]:
    found: set[str] = set()
    for graph in graphs:
        nodes = graph.program.entries[0].graph.graph.nodes if graph.program is not None else ()
        local = {module_of(node) for node in nodes} - {""}
        found |= {f"{owner}.{path}" if owner else path for owner in graph.owners for path in local}
    return frozenset(found)


def _traced(model: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    optimize = torch._dynamo.optimize
    if "isolate_recompiles" in inspect.signature(optimize).parameters:
        return optimize(backend, dynamic=dynamic, isolate_recompiles=True)(model)  # type: ignore[no-any-return]
    return torch.compile(model, backend=backend, dynamic=dynamic)


def _run(call: Callable[..., Any], skeleton: Skeleton) -> Stop | None:
    """Run once. Sizes stay as they are given: what one call sees must not make a later compilation dynamic."""
    args, kwargs = skeleton.inputs()
    settings = torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=1 << 12)
    with torch.no_grad(), skeleton.running(), settings, _forgotten():
        try:
            call(*args, **kwargs)
        except EffError:
            raise
        except Exception as error:
            return _stop(error, skeleton.model)
    return None


def _called(skeleton: Skeleton) -> tuple[frozenset[str], Stop | None]:
    model = skeleton.model
    if not isinstance(model, nn.Module):
        return frozenset(), None
    seen: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: seen.add(path)) for path, module in model.named_modules()
    ]
    args, kwargs = skeleton.inputs()
    try:
        with torch.no_grad(), skeleton.running(), _quiet():
            model(*args, **kwargs)
    except Exception as error:
        return frozenset(seen), _stop(error, model)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(seen), None


@contextmanager
def _forgotten() -> Iterator[None]:
    """Make Dynamo forget what it learns in this block about the frames that it meets.

    It marks code that it gave up on (a break inside a loop) and then skips it for good, for every model of the class and every
    backend: a dry run must leave no such mark. Code that was compiled before keeps what was compiled.
    """
    from torch._dynamo import convert_frame, eval_frame
    from torch._dynamo.types import FrameAction, FrameExecStrategy

    known = convert_frame.input_codes
    convert_frame.input_codes = met = convert_frame.Tracker()
    try:
        yield
    finally:
        convert_frame.input_codes = known
        for code in filter(None, (reference() for reference in met.seen)):
            if code in known:
                eval_frame.set_code_exec_strategy(code, FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT))
            else:
                eval_frame.reset_code(code)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging an op without a fake implementation as an error: that is an answer here, not a fault."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _stop(error: Exception, model: Any) -> Stop:
    """Name the user's line and module where the run ended; a mistake in the call itself is the user's to mend."""
    frames = list(traceback.walk_tb(error.__traceback__))
    paths = {id(module): path for path, module in model.named_modules()} if isinstance(model, nn.Module) else {}
    source, module = "", ""
    for frame, line in frames:
        owner = frame.f_locals.get("self")
        if id(owner) in paths:
            module = paths[id(owner)]
        if "/torch/" not in frame.f_code.co_filename and frame.f_globals.get("__name__") != __name__:
            source = f"{frame.f_code.co_filename}:{line}"
    lines = str(error).strip().splitlines()
    if not source:  # raised while tracing: Dynamo quotes the user's stack
        quoted = [frame for frame in _QUOTED.findall(str(error)) if "/torch/" not in frame[0]]
        source = ":".join(quoted[-1]) if quoted else ""
    return Stop(f"{type(error).__name__}: {lines[0] if lines else 'no message'}", source, module)


def _breaks(gm: fx.GraphModule, program: Program | None) -> tuple[Break, ...]:
    if program is not None:
        return program.breaks
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return ()
    frames = list(reason.user_stack or ())
    source = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return (Break(str(reason.reason).splitlines()[0], source),)


def _kept(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    return value


def _with_contents(program: Program, origins: Mapping[int, torch.Tensor]) -> Program:
    """Give copied buffers the user's content, on which a proof about a mask may rest; one on meta has none."""

    def filled(item: Input) -> Input:
        return replace(item, value=origins.get(id(item.value), item.value))

    entries = tuple(replace(entry, inputs=tuple(map(filled, entry.inputs))) for entry in program.entries)
    return replace(program, entries=entries)


def _paths_of_tensors(model: Any) -> dict[int, str]:
    if not isinstance(model, nn.Module):
        return {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found: dict[int, str] = {}
    for path, tensor in named:
        found.setdefault(id(tensor), path)
    return found


def _local_name(node: fx.Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return ""
    return module_path(source.name if isinstance(source.name, str) else source.name())


def _owner(names: Sequence[str], args: Sequence[Any], paths: Mapping[int, str]) -> str:
    """Return the path in front of a graph's own names: `layers.3` where `q.weight` is `layers.3.q.weight`."""
    for name, value in zip(names, args):
        path = paths.get(id(value), "")
        # A frame that calls its module something other than `self` keeps that name in front.
        for local in (name, name.partition(".")[2]):
            if local and path.endswith("." + local):
                return path[: -len(local) - 1]
            if local and path == local:
                return ""
    return ""
