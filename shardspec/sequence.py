"""How a sequence lies over cp, and which blocks of scores a rank computes. Imports no torch.

In order, rank r of n holds one run of the sequence. Head and tail ("balanced"), it is cut into 2n chunks of which rank
r holds r and 2n - 1 - r: of causal scores every rank then has as many.
"""

from collections.abc import Sequence

from attrs import frozen

AXIS = "cp"
"""The axis that splits a sequence for attention."""


@frozen
class Block:
    """Rows and columns of scores, in chunks of what is at hand; `causal` where row i reads columns 0 to i alone."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    causal: bool = False

    @property
    def work(self) -> float:
        """Scores that are computed, in chunks squared: of a causal block half."""
        area = (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])
        return area / 2 if self.causal else float(area)


@frozen
class Grid:
    """The blocks of a rank's queries with the keys at hand, and into how many chunks each are cut."""

    rows: int
    columns: int
    blocks: tuple[Block, ...]


def chunks_of(rank: int, ranks: int, *, balanced: bool) -> tuple[int, ...]:
    """The chunks of the sequence that a rank holds, in its order."""
    return (rank, 2 * ranks - 1 - rank) if balanced else (rank,)


def order(ranks: int, *, balanced: bool) -> tuple[int, ...]:
    """The chunks of the sequence in the order of ranks: what a gather makes, one rank after another."""
    return tuple(chunk for rank in range(ranks) for chunk in chunks_of(rank, ranks, balanced=balanced))


def places(ranks: int) -> tuple[int, ...]:
    """Chunk of a balanced sequence -> where it stands in the order of ranks."""
    laid = order(ranks, balanced=True)
    return tuple(laid.index(chunk) for chunk in range(len(laid)))


def grid(rows: Sequence[int], columns: Sequence[int], *, causal: bool) -> Grid:
    """The blocks that chunks of queries compute with chunks of keys; what is masked whole is left out.

    Args:
        rows: the queries' chunks, in their order.
        columns: the keys' chunks, ascending.
    """
    if not causal:
        return Grid(len(rows), len(columns), (Block((0, len(rows)), (0, len(columns))),))
    found: list[Block] = []
    for at, chunk in enumerate(rows):
        before = sum(column < chunk for column in columns)
        last = found[-1] if found and not found[-1].causal else None
        if before and last is not None and last.rows[1] == at and last.columns == (0, before):
            found[-1] = Block((last.rows[0], at + 1), last.columns)
        elif before:
            found.append(Block((at, at + 1), (0, before)))
        if chunk in columns:
            found.append(Block((at, at + 1), (columns.index(chunk), columns.index(chunk) + 1), causal=True))
    return Grid(len(rows), len(columns), tuple(found))


def work(rank: int, ranks: int, *, causal: bool, balanced: bool) -> float:
    """The share of all scores of one head that a rank computes, as a fraction of the whole square."""
    rows, whole = chunks_of(rank, ranks, balanced=balanced), range(2 * ranks if balanced else ranks)
    return sum(block.work for block in grid(rows, whole, causal=causal).blocks) / len(whole) ** 2
