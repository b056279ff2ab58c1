"""Compare what an export gives with what its model gives, at several values of every size that varies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from effcompile.capture.decoder import BATCH, LENGTH, cached_decoder
from effcompile.capture.subject import Subject, subject
from effcompile.codegen.onnx.check import errors, errors_of_codes
from effcompile.core.artifact import Check, Manifest
from effcompile.core.emitter import Runner
from effcompile.core.errors import EffError
from effcompile.core.program import Program

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""The largest |difference| over the largest |reference| that a check accepts, by the dtype of the output."""
_TOKENS = ("input_ids", "tokens", "decoder_input_ids")


@dataclass(frozen=True)
class Call:
    """Hold a model's call as flat tensors: `sizes` names what may vary in each of them, None where a size is fixed."""

    values: tuple[Tensor, ...]
    sizes: tuple[tuple[str | None, ...], ...]

    def hints(self) -> dict[str, int]:
        """Return the sizes of the given call."""
        known = {s: n for x, row in zip(self.values, self.sizes, strict=True) for n, s in zip(x.shape, row) if s}
        return {size: n for size, n in known.items() if size.isidentifier()}  # a sum of sizes is none of its own

    def at(self, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        """Return the tensors at other sizes: their content is repeated, or cut."""
        made = []
        for value, row in zip(self.values, self.sizes, strict=True):
            for dim, name in enumerate(row):
                if name and sizes[name] != value.shape[dim]:
                    value = value.index_select(dim, torch.arange(sizes[name]) % value.shape[dim])
            made.append(value)
        return tuple(made)


def call_of(exported: torch.export.ExportedProgram, program: Program) -> Call:
    """Return the call that a program was captured with."""
    args, kwargs = exported.example_inputs
    flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    entry = program.entries[0]
    nodes = {node.name: node for node in entry.graph.graph.nodes if node.op == "placeholder"}
    users = [
        item.node for item in entry.inputs if item.kind == "user" and isinstance(nodes[item.node].meta["val"], Tensor)
    ]
    rows = [_sizes(nodes[name]) for name in users]
    called = _called([(name, row) for name, row in zip(users, rows, strict=True)])
    return Call(tuple(flat), tuple(tuple(size and called[size] for size in row) for row in rows))


def _called(inputs: Sequence[tuple[str, tuple[str | None, ...]]]) -> dict[str, str]:
    """Return a name for every symbol of (input, sizes) pairs, by where it stands first: a number says nothing to a reader."""
    found: dict[str, str] = {}
    for name, row in inputs:
        for dim, size in enumerate(row):
            if size is None or size in found:
                continue
            plain = BATCH if dim == 0 else LENGTH if dim == 1 and name in _TOKENS else ""
            found[size] = plain if plain and plain not in found.values() else f"{name}_{dim}"
    return found


def _sizes(node: fx.Node) -> tuple[str | None, ...]:
    return tuple(
        str(size) if isinstance(size, torch.SymInt) and str(size).isidentifier() else None
        for size in node.meta["val"].shape
    )


def checked(
    of: Subject, exported: torch.export.ExportedProgram, call: Call, session: Runner, single: bool, meant: Any = None
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Compare an export with eager at the given sizes, and with each size that may vary at another one.

    `single` leaves out calls of several tokens behind a cache; `meant` gives the numbers that are meant, where not the model.
    Returns the comparisons, and the sizes that could not be changed, alone or with all of the same value, since the model holds
    them to others.
    """
    model = of.model if meant is None else meant
    if of.points is not None:
        checks: list[Check] = []
        for point in of.points(single):
            if of.follow is None:
                wanted = pytree.tree_leaves(model(*point.args))
                each = errors(session, point.args, wanted, point.real)
            else:
                each = errors_of_codes(session, point.args, of.follow, len(of.outputs), point.real)
            checks += _accepted(each, point.sizes)
        return tuple(checks), ()
    guarded = exported.module()
    eager = guarded if model is exported else model
    hints = call.hints()
    found: list[Check] = []
    held: list[str] = []
    changes: list[tuple[str, ...]] = [(), *((name,) for name in hints)]
    for place, change in enumerate(changes):
        sizes = {**hints, **{name: hints[name] + place for name in change}}
        tensors = call.at(sizes)
        leaves = iter(tensors)
        given = [next(leaves) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(exported.example_inputs)]
        args, kwargs = pytree.tree_unflatten(given, exported.call_spec.in_spec)
        try:
            guarded(*args, **kwargs)
            wanted = eager(*args, **kwargs)
        except (AssertionError, RuntimeError, IndexError, ValueError):
            if not change:
                raise
            together = tuple(name for name in hints if hints[name] == hints[change[0]])
            if len(change) == 1 and len(together) > 1:
                if together not in changes:  # of inputs that belong together, such as tokens and their mask
                    changes.append(together)
            else:
                held.extend(change)
            continue
        exact = [x for x in pytree.tree_leaves(wanted) if isinstance(x, Tensor)]
        found += _accepted(errors(session, tensors, exact), sizes)
    return tuple(found), tuple(held)


def _accepted(found: Mapping[str, tuple[float, torch.dtype]], sizes: Mapping[str, int]) -> Iterator[Check]:
    """Yield the comparison of each output.

    Raises:
        EffError: EFF-E110 where one is too far away.
    """
    for output, (error, kind) in found.items():
        if not error <= LIMITS.get(kind, 0.0):
            told = ", ".join(f"{key}={n}" for key, n in sizes.items())
            raise EffError(
                "EFF-E110",
                f"`{output}` is {error:.2e} away from eager at {told or 'the given sizes'}",
                hint="model.eval() turns dropout off; eff repro MODEL finds a rewrite that is wrong",
            )
        yield Check(tuple(sizes.items()), float(f"{error:.3g}"), output)


def compare(
    session: Runner, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[float, torch.dtype]]:
    """Run an artifact and its model on one call; return for each output its error and the model's dtype.

    Raises:
        EffError: EFF-E110 where they have not the same number of outputs, EFF-E111 where the artifact does not take the call.
    """
    with torch.no_grad():
        wanted = [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
    tensors = [x for x in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(x, Tensor)]
    return errors(session, tensors, wanted)


def compare_call(
    session: Runner, manifest: Manifest, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[float, torch.dtype]]:
    """Do the same with a call of a model whose cache the artifact takes: the call's tokens come behind some of their own.

    Raises:
        EffError: as `compare`; EFF-E118 where the cache holds codes, which eager has no calls of.
    """
    if not dict(manifest.details).get("cache") and not dict(manifest.details).get("part"):
        return compare(session, model, args, kwargs)
    if dict(manifest.details).get("kv"):
        raise EffError(
            "EFF-E118",
            "the cache of the artifact holds codes: it was compared when it was exported",
            hint="eff verify DIR without --model checks its files",
        )
    if part := dict(manifest.details).get("part"):
        with torch.no_grad():
            given = subject(model, (), dict(kwargs), True, True, part=part)
            return compare(session, given.model, given.args, {})
    call = cached_decoder(model, buffered=bool(dict(manifest.details).get("buffers")))
    ids = next(x for x in pytree.tree_leaves((tuple(args), dict(kwargs))) if isinstance(x, Tensor))
    with torch.no_grad():
        point = call.point(ids.shape[0], ids.shape[1], 3)
        return errors(session, point.args, call.module(*point.args), point.real)
