"""What attention over cp holds on a rank, by strategy: a `Record` of the calls of runtime/context.py."""

from collections.abc import Sequence

from attrs import frozen

from shardspec.amounts import Amount, as_kind, plus, times
from shardspec.footprint import KEPT, PASSING, Record
from shardspec.peaks import Peaks


@frozen(kw_only=True, eq=False)
class Held:
    """Bytes on a rank of queries, keys, values and the result; of gathered keys and values; and of the result's
    log-sum-exp. `sums` are those of the same tensors in the dtype of sums, where gradients and results add up."""

    q: Amount
    k: Amount
    v: Amount
    out: Amount
    keys: Amount
    values: Amount
    lse: Amount
    mask: Amount
    sums: "Held | None" = None

    @property
    def wide(self) -> "Held":
        """The same in the dtype of sums."""
        return self.sums or self

    @property
    def own(self) -> Amount:
        """A rank's keys and values together."""
        return plus(self.k, self.v)

    @property
    def all(self) -> Amount:
        """All keys and values together."""
        return plus(self.keys, self.values)


def record(strategy: str, held: Held, live: Sequence[bool], ranks: int, *, masked: bool) -> Record:
    """What one attention does to memory: forward, what is kept, backward."""
    made = gathered_whole if masked and strategy == "allgather" else FORMS[strategy]
    found = made(held, ranks)
    grads = (held.q, held.k, held.v, held.mask)
    return Record(
        outputs=(as_kind(PASSING, held.out),),
        operands_kept=frozenset(range(len(live))) if strategy != "ulysses" else frozenset(),
        outputs_kept=frozenset({0}) if strategy != "ulysses" else frozenset(),
        kept=as_kind(KEPT, found.kept),
        forward=Peaks.of(found.forward),
        backward=Peaks.of(found.backward),
        grads=tuple(grad if wants else None for grad, wants in zip(grads, live, strict=False)),
    )


@frozen(kw_only=True, eq=False)
class Form:
    """The moments of forward and backward that may hold the most, and what is kept besides operands and result."""

    forward: tuple[Amount, ...]
    backward: tuple[Amount, ...]
    kept: Amount


def gathered(held: Held, ranks: int) -> Form:
    """Keys and values are gathered, and gathered again in backward: `_Gathered`."""
    del ranks
    wide = held.wide
    rows = plus(wide.out, wide.lse)
    merging = plus(held.out, wide.out, wide.lse, wide.lse)
    arriving = plus(held.keys, held.values, held.values, held.v)
    sums = plus(wide.keys, wide.values)
    block = plus(held.q, held.keys, held.values)
    return Form(
        forward=(plus(rows, arriving), plus(rows, held.all, merging)),
        backward=(
            plus(wide.q, arriving),
            plus(wide.q, held.all, sums, block),
            plus(wide.q, sums, wide.keys, wide.k),
            plus(wide.q, sums, wide.values, wide.k, wide.v),
        ),
        kept=wide.lse,
    )


def gathered_whole(held: Held, ranks: int) -> Form:
    """Keys and values are gathered and kept, for torch's own attention with a mask."""
    del ranks
    return Form(
        forward=(plus(held.keys, held.values, held.values, held.v), plus(held.all, held.out, held.wide.lse, held.mask)),
        backward=(
            plus(held.q, held.all, held.out),
            plus(held.q, held.all, held.values, held.v),
            plus(held.q, held.keys, held.keys, held.own),
        ),
        kept=plus(held.all, held.wide.lse, held.mask),
    )


def ring(held: Held, ranks: int) -> Form:
    """Keys and values travel: what is at hand, what arrives, and in backward sums behind them: `_Ring`.

    Of two ranks no sum is on its way while a block is computed, of three no key.
    """
    wide = held.wide
    rows = plus(wide.out, wide.lse)
    travelling = times(held.own, 2)
    merging = plus(held.out, wide.out, wide.lse, wide.lse)
    return Form(
        forward=(plus(rows, travelling, merging),),
        backward=(
            plus(wide.q, travelling, wide.own, held.q, held.own),
            plus(
                wide.q, held.own if ranks < 4 else travelling, times(wide.own, 1 if ranks < 3 else 4), held.q, held.own
            ),
        ),
        kept=wide.lse,
    )


def exchanged(held: Held, ranks: int) -> Form:
    """Sequence for heads, torch's own attention, and back: `_ToHeads` and `from_heads`."""
    del ranks
    inside = plus(held.q, held.k, held.v)
    return Form(
        forward=(
            plus(held.q, held.k, times(held.v, 3)),
            plus(held.q, times(held.k, 3)),
            times(held.q, 3),
            plus(inside, held.wide.lse, times(held.out, 4)),
        ),
        backward=(times(held.out, 3), plus(held.out, inside), plus(inside, times(held.q, 3))),
        kept=plus(inside, held.out, held.wide.lse),
    )


FORMS = {"allgather": gathered, "ring": ring, "ulysses": exchanged}
"""Strategy -> its moments; nothing of them is there on its own account."""
