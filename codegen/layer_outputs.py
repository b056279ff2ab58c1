"""Read what a repeated layer returns from where it begins.

A sub-graph may return a view that lies somewhere in a buffer, as the second half of a `chunk` does. The tensor that comes back from
the call begins at its first element, and yet TorchInductor (torch 2.11 to 2.15) writes the view's offset into the layout of the
result, so that the caller adds it once more and reads past the values, or past the memory. Here that offset is 0, before anything
has been lowered that reads the result; a result that then begins between two multiples of what Triton takes for granted is noted
as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def from_their_start() -> Iterator[None]:
    """Let results of `invoke_subgraph` begin at their first element in everything that is compiled inside."""
    from torch._inductor import ir

    original = ir.InvokeSubgraph.create

    def create(subgraph: Any, *operands: Any) -> Any:
        results = original(subgraph, *operands)
        for result in results:
            if isinstance(result, ir.MultiOutput):
                _begin_at_first(result)
        return results

    with mock.patch.object(ir.InvokeSubgraph, "create", create):
        yield


def _begin_at_first(result: Any) -> None:
    from torch._inductor import ir, utils
    from torch._inductor.virtualized import V

    layout = result.layout
    if layout.offset == 0:
        return
    bytes_before = layout.offset * layout.dtype.itemsize
    if not V.graph.sizevars.statically_known_multiple_of(bytes_before, utils.GPU_ALIGN_BYTES):
        V.graph.unaligned_buffers.add(result.get_name())
    result.layout = ir.FixedLayout(
        layout.device, layout.dtype, layout.size, layout.stride, offset=0, is_pinned=layout.is_pinned
    )
