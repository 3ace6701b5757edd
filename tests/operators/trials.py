"""Random trials of the operator cases: shapes, meshes and layouts that agree on the labels, most of the time."""

import functools
import types
from collections.abc import Sequence
from math import prod
from random import Random

import torch
from attrs import frozen
from torch import Tensor

import shardspec as ss
from shardspec.layout import AVG, MAX, MIN, SUM, Layout
from shardspec.testing.bruteforce import Verdict, verify_operator
from tests.operators.cases import Case
from tests.strategies import a_dim, a_layout, a_mesh, a_sum, merge, primes


@frozen
class Trial:
    """Inputs of a case on a mesh, with their layouts."""

    sizes: dict[str, int]
    inputs: tuple[Tensor, ...]
    layouts: tuple[Layout, ...]
    lengths: types.SimpleNamespace


def a_trial(rng: Random, case: Case, sums: float = 0.0) -> Trial:
    """Inputs for a case, and layouts that agree on its labels, but for a change now and then.

    Args:
        sums: the chance that a label's dim is a direct sum.
    """
    sizes = a_mesh(rng, most=8)
    rare = {word[0] for word in case.labels.replace(",", " ").split() if word.endswith("!")}
    operands = [operand.replace("!", "").split() for operand in case.labels.split(",")]
    labels = sorted({label for operand in operands for label in operand} - {"1"})
    factors: dict[str, list[int]] = {label: primes(rng, 3 if len(labels) < 4 else 2, 1) for label in labels}
    factors["1"] = []
    if {"q", "k"} <= set(labels):
        factors["q"] = factors["k"] + rng.choice([[], [2], [3]])
    lengths = types.SimpleNamespace(**{label: prod(factors[label]) for label in labels})
    free = list(sizes)
    digits = {
        label: a_sum(rng, factors[label], free, sizes)
        if sums and label not in rare and rng.random() < sums
        else a_dim(rng, factors[label], free, sizes, eager=0.1 if label in rare else 0.7)
        for label in rng.sample(labels, len(labels))
    }
    digits["1"] = ()
    if {"q", "k"} <= set(labels) and rng.random() < 0.7:
        digits["q"] = merge([*digits["k"], prod(factors["q"]) // prod(factors["k"])])
    found = [
        a_change(
            rng, operand, Layout(tuple(digits[label] for label in operand)), factors, sizes, kinds_of(case, number)
        )
        for number, operand in enumerate(operands)
    ]
    generator = torch.Generator().manual_seed(rng.randint(0, 99))
    inputs: list[Tensor] = []
    for number, operand in enumerate(operands):
        how = case.make[number] if number < len(case.make) else " "
        inputs.append(fill([prod(factors[label]) for label in operand], how, lengths, generator))
        if how == "?":
            found[number] = Layout(found[number].dims)
    return Trial(sizes, tuple(inputs), tuple(found), lengths)


def kinds_of(case: Case, number: int) -> tuple[str, ...]:
    """In which ways an operand may be pending: of whole numbers there is no mean."""
    whole = number < len(case.make) and case.make[number].isalpha()
    return (SUM, MAX, MIN) if whole else (SUM, SUM, AVG, MAX, MIN)


def a_change(
    rng: Random, operand: list[str], layout: Layout, factors: dict, sizes: dict[str, int], kinds: tuple[str, ...]
) -> Layout:
    """Mostly the same layout; now and then any other, a pending one, or one with a dim whole."""
    free = sorted(set(sizes) - set(layout.sharded))
    match rng.randint(0, 9):
        case 0:
            return a_layout(rng, [factors[label] for label in operand], sizes, kinds=kinds)
        case 1 | 2 if free:
            return Layout(layout.dims, ((rng.choice(free), rng.choice(kinds)),))
        case 3 if operand:
            whole = rng.randrange(len(operand))
            size = prod(factors[operand[whole]])
            dims = [merge([size]) if at == whole else dim for at, dim in enumerate(layout.dims)]
            return Layout(tuple(dims))
        case _:
            return layout


def fill(shape: Sequence[int], how: str, lengths: types.SimpleNamespace, generator: torch.Generator) -> Tensor:
    if how == "?":
        return torch.rand(tuple(shape), generator=generator) < 0.5
    if how in "abcdefghijklmnopqrstuvwxyz":
        return torch.randint(0, getattr(lengths, how), tuple(shape), generator=generator)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    return values.abs() + 0.1 if how == "+" else values


def verdict_of(case: Case, trial: Trial) -> Verdict:
    op = functools.partial(lambda *tensors: case.op(tensors, trial.lengths))
    return verify_operator(op, trial.inputs, trial.layouts, ss.Mesh(**trial.sizes))
