"""Say which blocks a mask allows, which of them stay whatever a selector thinks, and what a selector may look at.

Every selector reads q and k and returns a map `[B, H', Qb, Kb]`. What it may choose from is the same for all: the blocks in which
the predicate may keep a pair. What stays is the same as well: the first allowed block of a row, where models put probability that
nothing needs, and the blocks with the queries' own keys. A block of queries is judged by keys that all of its queries may read,
so that under causal order no key changes the map of a query before it. Its queries do decide together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F

from effcompile.core.expr import BATCH, HEAD, TRUE, Expr, axes_of
from effcompile.core.expr_eval import evaluate, from_json
from effcompile.core.intervals import block_bounds
from effcompile.ops import native
from effcompile.ops.row_limits import Limits, split_limits, values

_CHUNK = 1 << 20  # scores that exist at a time
_TILES = 64  # tiles that are evaluated at a time
_SMALL = 1 << 24  # elements of a map up to which a grid keeps it


@dataclass(frozen=True)
class BlockGrid:
    """Hold a problem's extents (B, Hq, Q, K), the blocks (queries, keys), and the operands of its predicate."""

    extents: tuple[int, int, int, int]
    blocks: tuple[int, int]
    keep: str
    loads: Sequence[torch.Tensor]
    sizes: Sequence[int]
    device: torch.device
    _made: dict[object, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(
        extents: tuple[int, int, int, int],
        blocks: tuple[int, int],
        keep: str,
        loads: Sequence[torch.Tensor],
        sizes: Sequence[int],
        device: torch.device,
    ) -> BlockGrid:
        """Return a grid, one for all layers of a model where no tensor is in its predicate. Nobody writes into its maps."""
        if loads:
            return BlockGrid(extents, blocks, keep, loads, sizes, device)
        return _shared(tuple(map(int, extents)), blocks, keep, tuple(map(int, sizes)), device)  # type: ignore[arg-type]

    @property
    def counts(self) -> tuple[int, int]:
        """Return the numbers of query and key blocks."""
        return -(-self.extents[2] // self.blocks[0]), -(-self.extents[3] // self.blocks[1])

    @cached_property
    def limits(self) -> Limits:
        """Return what the predicate says of whole rows and keys."""
        found = values(split_limits(self.keep), self.extents, self.loads, self.sizes)
        return Limits(*(None if x is None else x.to(self.device) for x in (found.first, found.last, found.keys)))

    def bounds(self, blocks: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (every, some) of the predicate `[B|1, H|1, Qb, Kb]`, on blocks of any size."""
        predicate = from_json(self.keep)
        used = axes_of(predicate)
        lead = (self.extents[0] if BATCH in used else 1, self.extents[1] if HEAD in used else 1)
        return block_bounds(predicate, (*lead, *self.extents[2:]), blocks, self.loads, self.sizes, self.device)

    @cached_property
    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (every, some) of its own blocks, contiguous."""
        every, some = self.bounds(self.blocks)
        return every.contiguous(), some.contiguous()

    @cached_property
    def tiles(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return `tiles_of` all blocks that the predicate cuts; None where these are too many to keep, or tensors decide."""
        if self.loads:
            return None
        every, some = self.both
        cut = some & ~every
        if int(cut.sum()) * self.blocks[0] * self.blocks[1] > _SMALL:
            return None
        return tiles_of(self, split_limits(self.keep).rest, cut)

    @property
    def some(self) -> torch.Tensor:
        """Return where the predicate may keep a pair, `[B|1, H|1, Qb, Kb]`."""
        return self.both[1]

    @cached_property
    def weights(self) -> torch.Tensor:
        """Return the share of its pairs that the predicate keeps of each block: 1, 0, and a half where it cuts the block."""
        every, some = self.both
        return (every.float() + some.float()) / 2

    @cached_property
    def frontier(self) -> torch.Tensor | None:
        """Return the last key that all queries of a block may read, `[B|1, 1, Qb, 1]`; None without an order of keys.

        Rows that may read no key have no say.
        """
        last = self.limits.last
        if last is None:
            return None
        last = torch.where(last < 0, self.extents[3] - 1, last)
        tail = -last.shape[1] % self.blocks[0]
        return (
            F.pad(last, (0, tail), value=self.extents[3] - 1)
            .unflatten(1, (-1, self.blocks[0]))
            .amin(2)[:, None, :, None]
        )

    def past(self, unit: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the allowed units (queries, keys) whose keys all queries of the block may read, `[B|1, H|1, Uq, Uk]`.

        Units divide the blocks; None takes the blocks. Without causal order all allowed units are such, unless the predicate is
        neither a range of keys nor a set of keys: then only those that it keeps whole.
        """
        return self._kept(("past", unit), lambda: self._past(unit))

    def _past(self, unit: tuple[int, int] | None) -> torch.Tensor:
        queries, keys = unit or self.blocks
        allowed = self.some if unit is None else self.bounds(unit)[1]
        rows = self.blocks[0] // queries
        if self.frontier is not None:
            ends = torch.arange(1, allowed.shape[3] + 1, device=self.device) * keys
            seen = ends.clamp(max=self.extents[3]) - 1 <= self.frontier
        elif split_limits(self.keep).rest == TRUE:
            return allowed
        else:
            seen = self.bounds((self.blocks[0], keys))[0]
        return allowed & seen.repeat_interleave(rows, 2)[:, :, : allowed.shape[2]]

    def forced(self, local: int = 1) -> torch.Tensor:
        """Return the allowed blocks that stay: the first of a row, those with its own keys, and `local` - 1 before them.

        One query stands at the end of what it may read. Without causal order the own keys are those at the queries' places, and as
        many stay on both sides.
        """
        return self._kept(("forced", local), lambda: self._forced(local))

    def _forced(self, local: int) -> torch.Tensor:
        some, past = self.some, self.past()
        places = torch.arange(some.shape[-1], device=self.device)
        first = some.int().argmax(-1, keepdim=True)
        if self.extents[2] == 1:
            last = some.shape[-1] - 1 - some.flip(-1).int().argmax(-1, keepdim=True)
            near = (places <= last) & (places > last - local)
        elif self.frontier is None:
            width, height = self.blocks[1], self.blocks[0]
            begin = torch.arange(some.shape[-2], device=self.device)[:, None] * height
            near = (places * width < begin + height + (local - 1) * width) & (
                (places + 1) * width > begin - (local - 1) * width
            )
        else:
            near = (places + 1) * self.blocks[1] > self.frontier - (local - 1) * self.blocks[1]
        return ((places == first) | near | ~past) & some

    @cached_property
    def real_rows(self) -> torch.Tensor | None:
        """Return the queries whose own key is in the set of keys, `[B, Q]`; None where there is no such set.

        The others are padding, and what they would choose must not count.
        """
        keys, last = self.limits.keys, self.limits.last
        if keys is None or (last is None and self.extents[2] != self.extents[3]):
            return None
        if last is None:
            return keys.bool()
        batch = max(keys.shape[0], last.shape[0])
        keys, last = keys.expand(batch, -1), last.expand(batch, -1)
        return keys.gather(1, last.clamp(0, self.extents[3] - 1).long()).bool() & (last >= 0)

    def _kept(self, name: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what was made under a name before, or make it; what is large is made anew each time."""
        if name not in self._made:
            value = make().contiguous()
            if value.numel() > _SMALL:
                return value
            self._made[name] = value
        return self._made[name]

    def pieces(self, width: int, rows: int) -> Iterator[slice]:
        """Yield slices of query blocks such that `rows` lines of `width` scores for each, batch and head fit into memory."""
        each = max(1, self.extents[0] * self.extents[1] * rows * width)
        step = max(1, _CHUNK // each)
        for begin in range(0, self.counts[0], step):
            yield slice(begin, min(self.counts[0], begin + step))


def tiles_of(grid: BlockGrid, rest: Expr, needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of the tile of each needed block `[B|1, H|1, Qb, Kb]`, -1 elsewhere, and the tiles `[N, q_block, k_block]`.

    A tile says which pairs of its block `rest` keeps; one serves all sequences and heads that it does not depend on.
    """
    used = axes_of(rest)
    needed = needed if BATCH in used else needed.any(0, keepdim=True)
    needed = needed if HEAD in used else needed.any(1, keepdim=True)
    places = needed.nonzero()
    number = torch.full(needed.shape, -1, dtype=torch.int32)
    number[needed] = torch.arange(len(places), dtype=torch.int32)
    tiles = torch.empty((len(places), *grid.blocks), dtype=torch.uint8)
    steps = [torch.arange(n) for n in grid.blocks]
    for begin in range(0, len(places), _TILES):
        b, h, line, column = (places[begin : begin + _TILES, n].reshape(-1, 1, 1) for n in range(4))
        rows = (line * grid.blocks[0] + steps[0][:, None]).clamp(max=grid.extents[2] - 1)
        keys = (column * grid.blocks[1] + steps[1][None, :]).clamp(max=grid.extents[3] - 1)
        value = evaluate(rest, (b, h, rows, keys), grid.loads, grid.sizes)
        tiles[begin : begin + _TILES] = value.expand(len(b), *grid.blocks)
    return number, tiles


@lru_cache(maxsize=8)
def _shared(
    extents: tuple[int, int, int, int],
    blocks: tuple[int, int],
    keep: str,
    sizes: tuple[int, ...],
    device: torch.device,
) -> BlockGrid:
    return BlockGrid(extents, blocks, keep, (), sizes, device)


def means(x: torch.Tensor, unit: int, real: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of each unit of positions of x `[B, H, N, D]`, over the real ones `[B|1, N]`: `[B, H, U, D]` float32.

    A unit without any is 0. Float64 stays float64.
    """
    if native.runs(native.PROBES, x) and x.numel():
        return _compiled_means(x, unit, real, None)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    tail = -x.shape[2] % unit
    if real is None and not tail:
        return x.unflatten(2, (-1, unit)).mean(3, dtype=wide)
    real = torch.ones((1, x.shape[2]), dtype=torch.bool, device=x.device) if real is None else real
    weight = F.pad(real[:, None, :, None].to(wide), (0, 0, 0, tail)).unflatten(2, (-1, unit))
    total = F.pad(x * real[:, None, :, None], (0, 0, 0, tail)).unflatten(2, (-1, unit)).sum(3, dtype=wide)
    return total / weight.sum(3).clamp(min=1)


def alike(x: torch.Tensor, unit: int, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `means`, and the mean cosine between the real positions of each unit, themselves included, `[B, H, U]`."""
    if native.runs(native.PROBES, x) and x.numel():
        cosines = x.new_empty((*x.shape[:2], -(-x.shape[2] // unit)), dtype=torch.float32)
        return _compiled_means(x, unit, real, cosines), cosines
    # The mean over pairs of products of unit vectors is the square of their mean.
    return means(x, unit, real), means(F.normalize(x.float(), dim=-1), unit, real).square().sum(-1)


def _compiled_means(
    x: torch.Tensor, unit: int, real: torch.Tensor | None, cosines: torch.Tensor | None
) -> torch.Tensor:
    x = native.dense_rows(x)
    real = None if real is None else real.to(torch.uint8).contiguous()
    out = x.new_empty((*x.shape[:2], -(-x.shape[2] // unit), x.shape[3]), dtype=torch.float32)
    sizes = [*x.shape, unit, *x.stride()[:3], 1 if real is None else real.shape[0], torch.get_num_threads()]
    native.call(native.PROBES, "eff_block_means", x.dtype, sizes, [x, real, out, cosines], 0.0)
    return out


def grouped(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return q `[B, Hq, R, D]` times keys `[B, Hkv, C, D]` transposed, `[B, Hq, R, C]`, without repeating the keys."""
    batch, heads, rows, width = q.shape
    group = heads // keys.shape[1]
    packed = q.reshape(batch, heads // group, group * rows, width)
    return torch.matmul(packed, keys.transpose(-1, -2)).reshape(batch, heads, rows, keys.shape[2])


def block_mass(
    grid: BlockGrid,
    queries: torch.Tensor,
    keys: torch.Tensor,
    unit: tuple[int, int],
    scale: float,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the share of probability that each block gets `[B, Hq, Qb, Kb]` float32, where one vector stands for a unit.

    queries `[B, Hq, Uq, D]` and keys `[B, Hkv, Uk, D]` stand for units (queries, keys) that divide the blocks. A softmax over
    the units of keys in the past (`BlockGrid.past`), or the `allowed` ones `[B|1, H|1, Uq, Uk]`, is taken for each unit of queries,
    summed over the keys of a block and averaged over its queries.
    """
    allowed = grid.past(unit) if allowed is None else allowed
    batch, heads = grid.extents[:2]
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    out = torch.zeros((batch, heads, *grid.counts), dtype=wide, device=grid.device)
    rows, columns = grid.blocks[0] // unit[0], grid.blocks[1] // unit[1]
    for part in grid.pieces(keys.shape[2], rows):
        lines = slice(part.start * rows, min(queries.shape[2], part.stop * rows))
        mine = allowed[:, :, lines]
        seen = mine.flatten(0, 2).any(0).nonzero()
        if not len(seen):
            continue
        end = min(
            keys.shape[2], -(-(int(seen[-1]) + 1) // columns) * columns
        )  # early queries have few keys before them
        scores = grouped(queries[:, :, lines], keys[:, :, :end]).to(wide) * scale
        probs = scores.masked_fill_(~mine[..., :end], -torch.inf).softmax(-1).nan_to_num_()
        sums = F.pad(probs, (0, -end % columns)).unflatten(-1, (-1, columns)).sum(-1)
        count = lines.stop - lines.start
        full = F.pad(sums, (0, 0, 0, -count % rows)).unflatten(-2, (-1, rows)).sum(-2)
        many = torch.full((full.shape[-2], 1), float(rows), dtype=wide, device=grid.device)
        many[-1:] = count - (full.shape[-2] - 1) * rows
        out[:, :, part, : full.shape[-1]] = full / many
    return out
