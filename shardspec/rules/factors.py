"""Operator rules in factor notation: `b s d, !k d -> b s !k`, a name for each factor of each dim.

notation = operand { "," operand } "->" operand { "," operand }
operand  = { dim | [ "!" ] "..." }
dim      = factor | "(" factor { factor } ")"
factor   = [ "!" ] name | integer

What stands before the arrow is read, in the order of the operator's arguments; what stands behind it is made.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from attrs import frozen

from shardspec.layout import CutError, DimLayout, Layout, canonical, flatten, local_size, split
from shardspec.program import Ref, substitute, tensors
from shardspec.rules.operator import Call, Label, Refusal, Type, Typed, unify

TOKEN = re.compile(r"\s*(?:(?P<ellipsis>\.\.\.)|(?P<word>[A-Za-z_]\w*)|(?P<number>\d+)|(?P<mark>->|[!(),]))")

DimNames = tuple[str, ...]
"""The factors of one dim, major to minor; ("...",) for the dims that are not named."""

Operand = tuple[DimNames, ...]

LEAD = "..."


class NotationError(ValueError):
    """A notation that does not parse, or does not fit a call; the message says where and why."""


@frozen
class Notation:
    """A parsed notation; `whole` holds the factors that must not be split."""

    operands: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    whole: frozenset[str]

    @property
    def factors(self) -> tuple[str, ...]:
        """Every factor with a name, in order of appearance."""
        return tuple(dict.fromkeys(name for part in (*self.operands, *self.outputs) for dim in part for name in dim))

    def __str__(self) -> str:
        sides = (", ".join(self._text(part) for part in side) for side in (self.operands, self.outputs))
        return " -> ".join(sides)

    def _text(self, part: Operand) -> str:
        dims = (" ".join(("!" if name in self.whole else "") + name for name in dim) for dim in part)
        return " ".join(text if len(dim) == 1 else f"({text})" for dim, text in zip(part, dims, strict=True))


@lru_cache(maxsize=1024)
def parse_notation(text: str) -> Notation:
    """Parse `b s d, !k d -> b s !k`.

    Raises:
        NotationError: with the column and what was expected there.
    """
    sides: list[list[Operand]] = [[]]
    part: list[DimNames] = []
    group: list[str] | None = None
    whole: set[str] = set()
    marked = False
    for kind, word, column in _tokens(text):
        if marked and kind not in ("word", "ellipsis"):
            raise NotationError(f"column {column}: a factor's name is expected behind '!'")
        if kind in ("word", "number", "ellipsis"):
            if kind == "ellipsis" and (group is not None or (LEAD,) in part):
                raise NotationError(f"column {column}: '...' stands once in an operand, and in no group")
            whole |= {word} if marked else set()
            if group is None:
                part.append((word,))
            else:
                group.append(word)
        elif word == "(" and group is None:
            group = []
        elif word == ")" and group:
            part.append(tuple(group))
            group = None
        elif word in (",", "->") and group is None:
            sides[-1].append(tuple(part))
            part = []
            if word == "->":
                sides.append([])
        elif word != "!":
            raise NotationError(f"column {column}: {word!r} is not expected here")
        marked = word == "!"
    if marked or group is not None:
        raise NotationError(f"it ends {'behind a !' if marked else 'inside a group'}")
    sides[-1].append(tuple(part))
    if len(sides) != 2:
        raise NotationError("it has one '->': what the operator reads stands before it, what it makes behind")
    for operand in (*sides[0], *sides[1]):
        names = [name for dim in operand for name in dim if not name.isdecimal()]
        if len(set(names)) < len(names):
            raise NotationError(f"a factor stands twice in one tensor: {' '.join(names)}")
    return Notation(tuple(sides[0]), tuple(sides[1]), frozenset(whole))


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    at = 0
    while text[at:].strip():
        match = TOKEN.match(text, at)
        if match is None:
            raise NotationError(f"column {at + 1}: {text[at:].strip()[0]!r} is not part of the notation")
        yield str(match.lastgroup), match.group(str(match.lastgroup)), match.start(str(match.lastgroup)) + 1
        at = match.end()


Flat = list[list[list[str]]]
"""For each tensor and each of its dims, the labels of its factors; `...` is counted out."""


def spread(parts: Sequence[Operand], shapes: Sequence[Sequence[int]], lead: int | None = None) -> tuple[Flat, int]:
    """The labels of tensors' dims, with `...0`, `...1` for the dims that `...` stands for, and how many those are.

    Raises:
        NotationError: for a tensor with another number of dims.
    """
    spread_: Flat = []
    for part, shape in zip(parts, shapes, strict=True):
        more = len(shape) - len(part) + 1
        fits = more == 1
        if (LEAD,) in part:
            lead = more if lead is None else lead
            fits = lead == more >= 0
        if not fits:
            raise NotationError(f"a tensor has {len(shape)} dims, and the notation {' '.join(map(' '.join, part))!r}")
        dims: list[list[str]] = []
        for dim in part:
            dims += [[f"{LEAD}{index}"] for index in range(lead or 0)] if dim == (LEAD,) else [list(dim)]
        spread_.append(dims)
    return spread_, lead or 0


def learn(labels: Flat, shapes: Sequence[Sequence[int]], known: dict[str, int]) -> None:
    """Add to `known` the sizes of the factors that tensors of these shapes have.

    Raises:
        NotationError: for a factor with two sizes, or one that nothing tells.
    """
    dims = [
        (dim, size) for part, shape in zip(labels, shapes, strict=True) for dim, size in zip(part, shape, strict=True)
    ]
    known.update((name, int(name)) for dim, _ in dims for name in dim if name.isdecimal())
    waiting = dims
    while waiting:
        later: list[tuple[list[str], int]] = []
        for dim, size in waiting:
            missing = [name for name in dim if name not in known]
            rest = prod(known[name] for name in dim if name in known)
            if len(missing) > 1:
                later.append((dim, size))
            elif (missing and (not rest or size % rest)) or (not missing and rest != size):
                shown = " ".join(f"{name}={known[name]}" if name in known else name for name in dim)
                raise NotationError(f"a dim of {size} cannot be {shown}")
            elif missing:
                known[missing[0]] = size // rest
        if len(later) == len(waiting):
            raise NotationError(f"nothing tells the sizes of {' and '.join(later[0][0])}: name an argument in sizes=")
        waiting = later


@frozen(eq=False, kw_only=True)
class FactorRule:
    """A rule in factor notation, as `ss.register_rule` makes it; see there for what the fields mean."""

    notation: str | Callable[..., str]
    linear: tuple[frozenset[str], ...] = ()
    reduction: str = "sum"
    sizes: Mapping[str, str]
    any_value: frozenset[str] = frozenset()
    tried: frozenset[Any] | None = None
    """The values of the other arguments with which the rule was brute-forced; None while it is."""

    def parsed(self, named: Mapping[str, Any]) -> Notation:
        """The notation for a call, by its arguments: tensors on meta, the others as they are."""
        return parse_notation(self.notation if isinstance(self.notation, str) else self.notation(**named))

    def __call__(self, call: Call) -> Typed:
        """Type a call.

        Raises:
            Refusal: SS305 for a call unlike those that were tried, else what `unify` refuses.
        """
        if self.tried is not None and self.key(call.named) not in self.tried:
            known = "; ".join(map(_words, sorted(self.tried, key=str)))
            raise Refusal(
                "SS305",
                f"{call.node.op} is called in a way in which its rule was not tried",
                why=f"here {_words(self.key(call.named))}; tried with {known}",
                operands=[i for i, kind in enumerate(call.types) if kind.layout.sharded or kind.layout.pending],
                advice=(
                    "add such a call to the samples of ss.register_rule, or name in any_value= what does not matter",
                ),
            )
        try:
            return self._type(call)
        except NotationError as error:
            raise Refusal("SS305", f"the rule of {call.node.op} does not fit this call", why=str(error)) from None

    def key(self, named: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        """What of a call's arguments may decide its layout: all that are neither tensors nor sizes nor any value."""
        free = {*self.sizes, *self.any_value}
        return tuple((name, _frozen(value)) for name, value in named.items() if name not in free)

    def operands(self, notation: Notation, named: Mapping[str, Any]) -> tuple[list[Operand], dict[str, list[int]]]:
        """The notation of each tensor operand of a call, and which operands each argument is.

        Raises:
            NotationError: for another number of tensor arguments.
        """
        parts: list[Operand] = []
        places: dict[str, list[int]] = {}
        given = list(notation.operands)
        for name, value in named.items():
            if not tensors(value):
                continue
            if not given:
                raise NotationError(f"it names {len(notation.operands)} tensors, and {name} is one more")
            part = given.pop(0)
            places[name] = list(range(len(parts), len(parts) + len(tensors(value))))
            parts += [part] * len(places[name])
        if given:
            raise NotationError(f"it names {len(notation.operands)} tensors, and the call has {len(places)}")
        return parts, places

    def _type(self, call: Call) -> Typed:
        shapes = [call.shape(operand) for operand in range(len(call.types))]
        notation = self.parsed(
            substitute(call.named, lambda ref: _on_meta(call.values[ref.index].shape, call.values[ref.index].dtype))
        )
        parts, places = self.operands(notation, call.named)
        labels, lead = spread(parts, shapes)
        known = self.sizes_of(call.named)
        learn(labels, shapes, known)
        made = [call.values[index].shape for index in call.node.outputs if index is not None]
        if len(made) != len(notation.outputs):
            raise NotationError(f"it names {len(notation.outputs)} results, and the operator makes {len(made)}")
        outputs, _ = spread(notation.outputs, made, lead)
        learn(outputs, made, known)
        self._check_sizes(call.named, known)
        whole = {name for name in known if name.isdecimal() or name in notation.whole}
        whole |= {name for name in known if name.startswith(LEAD) and LEAD in notation.whole}
        flat = Call(
            call.node,
            call.values,
            tuple(_cut(call, operand, dims, known) for operand, dims in enumerate(labels)),
            call.sizes,
            call.refs,
        )
        typed = unify(
            flat,
            [_labels(dims) for dims in labels],
            [_labels(dims) for dims in outputs],
            linear=tuple(frozenset(at for name in group for at in places.get(name, ())) for group in self.linear),
            contracted=self.reduction,
            whole=whole,
            out_sizes=known,
        )
        digits = {
            label: dim
            for dims, kind in zip(labels, typed.consumed, strict=True)
            for label, dim in zip(_labels(dims), kind.layout.dims, strict=True)
        }
        local = {name: self._local(call.named[name], text, known, digits) for name, text in self.sizes.items()}
        return Typed(
            tuple(_joined(kind, dims) for kind, dims in zip(typed.outputs, outputs, strict=True)),
            tuple(_joined(kind, dims) for kind, dims in zip(typed.consumed, labels, strict=True)),
            {name: value for name, value in local.items() if value != call.named[name]},
        )

    def sizes_of(self, named: Mapping[str, Any]) -> dict[str, int]:
        """What the arguments that are sizes tell of single factors."""
        known: dict[str, int] = {}
        for name, text in self.sizes.items():
            values = named[name] if isinstance(named[name], (list, tuple)) else [named[name]]
            known.update(
                (dim[0], int(value)) for dim, value in zip(size_names(text), values, strict=False) if len(dim) == 1
            )
        return known

    def _check_sizes(self, named: Mapping[str, Any], known: Mapping[str, int]) -> None:
        for name, text in self.sizes.items():
            wanted = [prod(known[factor] for factor in dim) for dim in size_names(text)]
            value = named[name]
            if (list(value) if isinstance(value, (list, tuple)) else [value]) != wanted:
                raise NotationError(f"{name} is {value}, and {text} is {', '.join(map(str, wanted))}")

    def _local(self, value: Any, text: str, known: Mapping[str, int], digits: Mapping[Label, DimLayout]) -> Any:
        """What an argument that is a size must be on a rank."""
        sizes = [
            prod(local_size(digits[factor]) if factor in digits else known[factor] for factor in dim)
            for dim in size_names(text)
        ]
        return sizes if isinstance(value, (list, tuple)) else sizes[0]


@lru_cache(maxsize=256)
def size_names(text: str) -> Operand:
    """The factors of an argument that is a size: `h`, `(h e)`, or several for a list of sizes.

    Raises:
        NotationError: for what is no such text.
    """
    dims = parse_notation(f"{text} ->").operands
    if len(dims) != 1 or not dims[0] or (LEAD,) in dims[0]:
        raise NotationError(f"{text!r} does not name factors")
    return dims[0]


def _labels(dims: Sequence[Sequence[str]]) -> list[Label]:
    """One label a factor; factors that are the number one have none."""
    return [None if name == "1" else name for dim in dims for name in dim]


def _cut(call: Call, operand: int, dims: Sequence[Sequence[str]], known: Mapping[str, int]) -> Type:
    """An operand's type with a dim for each factor."""
    kind = call.types[operand]
    parts: list[DimLayout] = []
    uniform: set[int] = set()
    for at, (names, digits) in enumerate(zip(dims, kind.layout.dims, strict=True)):
        if at in kind.uniform:
            uniform.update(range(len(parts), len(parts) + len(names)))
        try:
            parts += split(digits, [known[name] for name in names], call.sizes) if len(names) > 1 else [digits]
        except CutError as error:
            raise Refusal(
                "SS301",
                f"{call.node.op} reads {call.operand(operand)}, whose dim {at} is split across ({' '.join(names)})",
                why=str(error),
                operands=(operand,),
                axis=error.axis,
            ) from None
    return Type(Layout(tuple(parts), kind.layout.pending), frozenset(uniform))


def _joined(kind: Type, dims: Sequence[Sequence[str]]) -> Type:
    """A type with a dim for each factor, as one with a dim for each of a tensor's."""
    found: list[DimLayout] = []
    uniform: set[int] = set()
    at = 0
    for index, names in enumerate(dims):
        found.append(canonical(flatten(kind.layout.dims[at : at + len(names)])))
        if names and kind.uniform.issuperset(range(at, at + len(names))):
            uniform.add(index)
        at += len(names)
    return Type(Layout(tuple(found), kind.layout.pending), frozenset(uniform))


def _on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _frozen(value: Any) -> Any:
    """An argument's value as something that compares: of tensors, only how many there are."""
    if isinstance(value, (Ref, torch.Tensor)):
        return "a tensor"
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _words(key: tuple[tuple[str, Any], ...]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in key if value != "a tensor") or "tensors alone"
