"""Operator rules by brute force: what the rules accept is what the ranks compute, forward and backward."""

import functools
import os
import types
from collections.abc import Callable, Iterator, Sequence
from math import prod
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attrs import frozen
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import shardspec as ss
from shardspec.layout import AVG, MAX, MIN, SUM, Layout
from shardspec.rules import index, reduction, view
from shardspec.rules.operator import (
    COPY,
    PRODUCT,
    RULES,
    Call,
    Label,
    Refusal,
    Type,
    Typed,
    aligned,
    aligned_output,
    unify,
)
from shardspec.testing.bruteforce import Verdict, verify_operator
from tests.strategies import a_dim, a_layout, a_mesh, merge, primes

aten = torch.ops.aten
TRIALS = int(os.environ.get("SHARDSPEC_TRIALS", "22"))
TALLY: dict[str, tuple[int, int]] = {}


@frozen
class Case:
    """An operator with labelled operands: those that share a label are laid out alike, most of the time."""

    name: str
    labels: str
    """`b s! i, o i`: a label a dim, `1` for a dim of size one, operands apart by commas; a label with a mark is
    seldom split, for the operator wants it whole."""
    op: Callable[..., Any]
    """(tensors, sizes of the labels) -> result."""
    make: str = ""
    """How each operand is filled: `+` positive, `v` whole numbers below the size of label v, `?` booleans, else
    normal; one character an operand."""


def case(name: str, labels: str, op: Callable[..., Any], make: str = "") -> Case:
    return Case(name, labels, op, make)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensors, sizes: function(*tensors)


def with_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensors, sizes: function(*tensors, sizes)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def written(tensor: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    """The tensor after a write in place to a copy of it."""
    copied = tensor.clone()
    write(copied)
    return copied * 1.0


def write_beside(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """A view reads what another view of the same tensor wrote."""
    copied = w.clone()
    one, other = copied[:2], copied[1:]
    one.mul_(y[:2])
    return x[..., 1:] * other


def write_below(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """A view reads what was written to the tensor itself."""
    copied = w.clone()
    other = copied[1:]
    copied.mul_(y)
    return x[..., 1:] * other


POINTWISE = [
    case("add", "b s d, b s d", plain(torch.add)),
    case("add of a vector", "b s d, d", plain(torch.add)),
    case("add of a column", "b s d, b 1 d", plain(torch.add)),
    case("add with alpha", "b d, b d", plain(lambda x, y: torch.add(x, y, alpha=3))),
    case("add of a number", "b d", plain(lambda x: x + 1.5)),
    case("sum of three", "b d, b d, b d", plain(lambda x, y, z: x + y + z)),
    case("sub", "b s d, b s d", plain(torch.sub)),
    case("sub from a number", "b d", plain(lambda x: 2.0 - x)),
    case("rsub", "b d, d", plain(lambda x, y: torch.rsub(x, y))),
    case("mul", "b s d, b s d", plain(torch.mul)),
    case("mul of a vector", "b s d, d", plain(torch.mul)),
    case("mul by a number", "b d", plain(lambda x: x * 2)),
    case("square by mul", "b d", plain(lambda x: x * x)),
    case("double by add", "b d", plain(lambda x: x + x)),
    case("div", "b d, b d", plain(torch.div), " +"),
    case("div by a number", "b d", plain(lambda x: x / 4)),
    case("number by tensor", "b d", plain(lambda x: 1 / x), "+"),
    case("floor division", "b d, b d", plain(lambda x, y: torch.div(x, y, rounding_mode="floor")), " +"),
    case("neg", "b d", plain(torch.neg)),
    case("silu", "b d", plain(F.silu)),
    case("gelu", "b d", plain(F.gelu)),
    case("relu", "b d", plain(F.relu)),
    case("exp", "b d", plain(torch.exp)),
    case("log", "b d", plain(torch.log), "+"),
    case("abs", "b d", plain(torch.abs)),
    case("sigmoid", "b d", plain(torch.sigmoid)),
    case("rsqrt", "b d", plain(torch.rsqrt), "+"),
    case("clamp", "b d", plain(lambda x: x.clamp(-0.5, 0.5))),
    case("pow 2", "b d", plain(lambda x: x**2)),
    case("pow 1", "b d", plain(lambda x: x**1)),
    case("pow", "b d, d", plain(torch.pow), "+ "),
    case("number to a power", "b d", plain(lambda x: 2**x)),
    case("maximum", "b d, b d", plain(torch.maximum)),
    case("greater", "b d, b d", plain(torch.gt)),
    case("equal to a number", "b d", plain(lambda x: x == 0)),
    case("where", "b d, b d, b d", plain(torch.where), "?  "),
    case("where with a number", "b d, b d", plain(lambda c, x: torch.where(c, x, 0.0)), "? "),
    case("where with another number", "b d, b d", plain(lambda c, x: torch.where(c, x, 1.0)), "? "),
    case("where on a comparison", "b d, b d", plain(lambda x, y: torch.where(x > 0, x, y))),
    case("masked fill", "b d, d", plain(lambda x, m: x.masked_fill(m, 0.0)), " ?"),
    case("masked fill with another number", "b d, d", plain(lambda x, m: x.masked_fill(m, 2.0)), " ?"),
    case("masked fill by a tensor", "b d, d, ", plain(lambda x, m, v: x.masked_fill(m, v)), " ? "),
    case("lerp", "b d, b d", plain(lambda x, y: torch.lerp(x, y, 0.3))),
    case("addcmul", "b d, b d, d", plain(torch.addcmul)),
    case("to float32", "b d", plain(lambda x: x.to(torch.float32))),
    case("to int", "b d", plain(lambda x: x.to(torch.int64))),
    case("to bool", "b d", plain(lambda x: x.to(torch.bool))),
    case("to itself", "b d", plain(lambda x: x.to(torch.float64))),
    case("type of another", "b d, o", plain(lambda x, y: x.type_as(y))),
    case("contiguous", "b d", plain(lambda x: x.transpose(0, 1).contiguous())),
    case("clone", "b d", plain(torch.clone)),
    case("detach", "b d, b d", plain(lambda x, y: x.detach() * y)),
    case("dropout in evaluation", "b d", plain(lambda x: F.dropout(x, 0.5, training=False))),
    case("add in place", "b d, b d", plain(lambda x, y: x.clone().add_(y))),
    case("add a number in place", "b d", plain(lambda x: x.clone().add_(1.0))),
    case("mul in place", "b d, d", plain(lambda x, y: x.clone().mul_(y))),
    case("div in place", "b d", plain(lambda x: x.clone().div_(2.0))),
    case("relu in place", "b d", plain(lambda x: x.clone().relu_())),
    case("write to a slice", "b! d!", plain(lambda x: written(x, lambda z: z[:, :2].mul_(3.0)))),
    case("write to a row", "b! d!, d!", plain(lambda x, y: written(x, lambda z: z[0].add_(y)))),
    case("write to a view", "b! d!", plain(lambda x: written(x, lambda z: z.view(-1).add_(1.0)))),
    case("write to a transpose", "b! d!, d! b!", plain(lambda x, y: written(x, lambda z: z.t().mul_(y)))),
    case("write to a part and read another", "b d!, d!, d!", plain(write_beside)),
    case("write to a tensor and read a part", "b d!, d!, d!", plain(write_below)),
    case("write to what was expanded", "b d", with_sizes(lambda x, n: x.new_zeros(n.b, n.d).add_(x).relu())),
    case("logical and", "b d, b d", plain(torch.logical_and), "??"),
    case("not", "b d", plain(torch.logical_not), "?"),
]

REDUCTIONS = [
    case("sum of all", "b s d", plain(torch.sum)),
    case("sum", "b s d", plain(lambda x: x.sum(1))),
    case("sum of two dims", "b s d", plain(lambda x: x.sum((0, 2)))),
    case("sum with the dim kept", "b s d", plain(lambda x: x.sum(-1, keepdim=True))),
    case("sum of whole numbers", "b s, v", plain(lambda i, v: i.sum()), "v "),
    case("mean of all", "b s d", plain(torch.mean)),
    case("mean", "b s d", plain(lambda x: x.mean(1))),
    case("mean of two dims", "b s d", plain(lambda x: x.mean((0, -1), keepdim=True))),
    case("mean of a mean", "b s d", plain(lambda x: x.mean(-1).mean(0))),
    case("sum of a mean", "b s d", plain(lambda x: x.mean(-1).sum(0))),
    case("mean of a sum", "b s d", plain(lambda x: x.sum(-1).mean(0))),
    case("amax", "b s d", plain(lambda x: x.amax(-1))),
    case("amax of all", "b s", plain(lambda x: x.amax())),
    case("max of all", "b s", plain(torch.max)),
    case("amin", "b s d", plain(lambda x: x.amin(1, keepdim=True))),
    case("amax of an amin", "b s d", plain(lambda x: x.amin(1).amax(0))),
    case("max along a dim", "b s", plain(lambda x: x.max(-1))),
    case("argmax", "b s", plain(lambda x: x.argmax(-1))),
    case("var", "b s d", plain(lambda x: x.var(-1))),
    case("prod", "b s", plain(lambda x: x.prod(1))),
    case("any", "b s", plain(lambda x: x.any(1)), "?"),
    case("all of all", "b! s", plain(torch.all), "?"),
    case("norm", "b s", plain(lambda x: torch.linalg.vector_norm(x, dim=-1))),
    case("logsumexp", "b s", plain(lambda x: torch.logsumexp(x, -1))),
    case("softmax", "b s d", plain(lambda x: x.softmax(-1))),
    case("softmax of a middle dim", "b s d", plain(lambda x: x.softmax(1))),
    case("log softmax", "b d", plain(lambda x: F.log_softmax(x, -1))),
    case("cumsum", "b s d", plain(lambda x: x.cumsum(1))),
    case("cumprod", "b s", plain(lambda x: x.cumprod(-1))),
    case("topk", "b d", with_sizes(lambda x, n: x.topk(max(1, n.d // 2)))),
    case("topk of a first dim", "b d", with_sizes(lambda x, n: x.topk(1, dim=0))),
    case("sort", "b d", plain(lambda x: x.sort(-1))),
    case("glu", "b x d", with_sizes(lambda x, n: F.glu(torch.cat([x, x], -1)))),
    case("rms norm", "b s d, d", with_sizes(lambda x, w, n: F.rms_norm(x, (n.d,), w, 1e-5))),
    case("rms norm without a weight", "b s d", with_sizes(lambda x, n: F.rms_norm(x, (n.d,)))),
    case("rms norm by hand", "b s d, d", plain(lambda x, w: x * (x * x).mean(-1, keepdim=True).add(1e-5).rsqrt() * w)),
    case("layer norm", "b s d, d, d", with_sizes(lambda x, w, c, n: F.layer_norm(x, (n.d,), w, c))),
    case("layer norm of two dims", "b s! d!", with_sizes(lambda x, n: F.layer_norm(x, (n.s, n.d)))),
    case("rms norm of heads", "b s h e, e", with_sizes(lambda x, w, n: F.rms_norm(x, (n.e,), w, 1e-5))),
    case("group of heads' norm", "b s h! e!, h! e!", with_sizes(lambda x, w, n: F.rms_norm(x, (n.h, n.e), w, 1e-5))),
]

CONTRACTIONS = [
    case("linear", "b s i, o i", plain(F.linear)),
    case("linear of a vector", "i, o i", plain(F.linear)),
    case("linear with a bias", "b i!, o i!, o", plain(F.linear)),
    case("linear with a bias of many dims", "b s i!, o i!, o", plain(F.linear)),
    case("two linears", "b d!, f d!, d! f", plain(lambda x, w, v: F.linear(F.relu(F.linear(x, w)), v))),
    case(
        "gated",
        "b d!, f d!, f d!, d! f",
        plain(lambda x, a, c, v: F.linear(F.silu(F.linear(x, a)) * F.linear(x, c), v)),
    ),
    case("mm", "m k, k n", plain(torch.mm)),
    case("bmm", "b m k, b k n", plain(torch.bmm)),
    case("matmul", "b m k, b k n", plain(torch.matmul)),
    case("matmul that broadcasts", "b h m k, h k n", plain(torch.matmul)),
    case("matmul of one matrix", "b m k, k n", plain(torch.matmul)),
    case("matmul with ones", "1 h m k, b 1 k n", plain(torch.matmul)),
    case("matmul by a vector", "b m k, k", plain(torch.matmul)),
    case("vector by matrix", "k, b k n", plain(torch.matmul)),
    case("mv", "m k, k", plain(torch.mv)),
    case("dot", "k, k", plain(torch.dot)),
    case("outer", "m, k", plain(torch.outer)),
    case("addmm", "n, m k!, k! n", plain(torch.addmm)),
    case("addmm of a matrix", "m n, m k!, k! n", plain(torch.addmm)),
    case("addmm scaled", "n, m k!, k! n", plain(lambda c, x, y: torch.addmm(c, x, y, beta=2.0, alpha=0.5))),
    case("baddbmm", "b m n, b m k, b k n", plain(torch.baddbmm)),
    case("einsum", "b s d, d h e", plain(lambda x, w: torch.einsum("bsd,dhe->bshe", x, w))),
    case("einsum that sums alone", "b s d, d h", plain(lambda x, w: torch.einsum("bsd,dh->bh", x, w))),
    case("einsum of scores", "b h s e, b h t e", plain(lambda x, w: torch.einsum("bhse,bhte->bhst", x, w))),
    case("einsum without an arrow", "b d, d h", plain(lambda x, w: torch.einsum("bd,dh", x, w))),
    case("einsum of three", "b i, i j, j o", plain(lambda x, w, v: torch.einsum("bi,ij,jo->bo", x, w, v))),
    case("einsum of one", "b s d", plain(lambda x: torch.einsum("bsd->db", x))),
]

VIEWS = [
    case("merge", "b s d", with_sizes(lambda x, n: x.view(n.b * n.s, n.d))),
    case("merge with a hole", "b s d", with_sizes(lambda x, n: x.reshape(-1, n.d))),
    case("merge the last two", "b h e", with_sizes(lambda x, n: x.reshape(n.b, n.h * n.e))),
    case("there and back", "b s d", with_sizes(lambda x, n: x.view(n.b * n.s, n.d).view(n.b, n.s, n.d))),
    case("split into heads", "b s h e", with_sizes(lambda x, n: x.flatten(2).view(n.b, n.s, n.h, n.e))),
    case(
        "merge and cut anew",
        "b h e",
        with_sizes(lambda x, n: x.reshape(n.b, n.h * n.e).view(n.b, *_halves(n.h * n.e))),
    ),
    case("cut in two", "b d", with_sizes(lambda x, n: x.view(n.b, *_halves(n.d)))),
    case("cut the first", "b d", with_sizes(lambda x, n: x.view(*_halves(n.b), n.d))),
    case("regroup", "b s d", with_sizes(lambda x, n: x.reshape(*_halves(n.b * n.s), n.d))),
    case("reshape all", "b s d", with_sizes(lambda x, n: x.reshape(n.d, n.s, n.b))),
    case("flatten", "b s d", plain(lambda x: x.flatten(1))),
    case("flatten all", "b s", plain(torch.flatten)),
    case("unflatten", "b d", with_sizes(lambda x, n: x.unflatten(-1, _halves(n.d)))),
    case("view of another", "b s d, b s d", plain(lambda x, y: x.reshape(-1).view_as(y) if False else x.view_as(y))),
    case("transpose", "b s d", plain(lambda x: x.transpose(1, 2))),
    case("t", "b d", plain(torch.t)),
    case("transpose and merge", "b h s e", plain(lambda x: x.transpose(1, 2).flatten(2))),
    case("permute", "b s d", plain(lambda x: x.permute(2, 0, 1))),
    case("movedim", "b s d", plain(lambda x: x.movedim(-1, 0))),
    case("unsqueeze", "b d", plain(lambda x: x.unsqueeze(1))),
    case("squeeze a dim", "b 1 d", plain(lambda x: x.squeeze(1))),
    case("squeeze any dim", "b s d", plain(lambda x: x.squeeze(1))),
    case("squeeze all", "b 1 d", plain(torch.squeeze)),
    case("expand", "b 1 d", with_sizes(lambda x, n: x.expand(n.b, 3, n.d))),
    case("expand and meet", "b 1 d, b s d", with_sizes(lambda x, y, n: x.expand(n.b, n.s, n.d) * y)),
    case("expand by a new dim and meet", "d, b s d", with_sizes(lambda x, y, n: x.expand(n.b, n.s, n.d) + y)),
    case("expand as another", "1 d, b d", plain(lambda x, y: x.expand_as(y) * y)),
    case(
        "expand, merge and meet", "b 1 d, b s d", with_sizes(lambda x, y, n: x.expand(-1, n.s, -1).reshape(y.shape) * y)
    ),
    case(
        "repeated heads",
        "b k e, b k r e",
        with_sizes(lambda x, y, n: x[:, :, None].expand(n.b, n.k, n.r, n.e) * y),
    ),
    case(
        "repeated heads, merged",
        "b k e",
        with_sizes(lambda x, n: x[:, :, None].expand(n.b, n.k, 2, n.e).reshape(n.b, n.k * 2, n.e)),
    ),
    case("repeat interleave", "b k e", plain(lambda x: x.repeat_interleave(2, dim=1))),
    case("repeat", "b k", plain(lambda x: x.repeat(2, 1))),
    case("repeat both", "b k", plain(lambda x: x.repeat(2, 3))),
    case("repeat by a new dim and meet", "d, b s d", with_sizes(lambda x, y, n: x.repeat(n.b, n.s, 1) + y)),
    case("repeat one and meet", "1 d, b d", with_sizes(lambda x, y, n: x.repeat(n.b, 1) * y)),
    case("slice", "b s d", with_sizes(lambda x, n: x[:, : max(1, n.s // 2)])),
    case("slice from behind", "b s d", with_sizes(lambda x, n: x[:, -max(1, n.s // 2) :])),
    case("slice from a negative start to the end", "b s d", with_sizes(lambda x, n: x[..., -n.d :])),
    case("slice a middle part", "s d", with_sizes(lambda x, n: x[n.s // 3 : 2 * n.s // 3 + 1])),
    case("slice with a step", "b s", plain(lambda x: x[:, ::2])),
    case("slice past the end", "b s", with_sizes(lambda x, n: x[:, : n.s + 3])),
    case("narrow", "b s", with_sizes(lambda x, n: x.narrow(1, n.s // 2, n.s - n.s // 2))),
    case("select", "b s d", plain(lambda x: x[:, 0])),
    case("select the last", "b s d", plain(lambda x: x.select(1, -1))),
    case("split in two", "b d", with_sizes(lambda x, n: torch.cat([x, x], -1).split(n.d, -1))),
    case("split", "b d", with_sizes(lambda x, n: x.split(max(1, n.d // 2), -1))),
    case("split by sizes", "b d", with_sizes(lambda x, n: x.split([n.d // 3, n.d - n.d // 3], 1))),
    case("chunk", "b d", plain(lambda x: x.chunk(2, -1))),
    case("chunk of the first dim", "b d", plain(lambda x: x.chunk(3))),
    case("fused projection", "b d, f d", with_sizes(lambda x, w, n: F.linear(x, w).chunk(2, -1))),
    case("unbind", "b s d", plain(lambda x: x.unbind(1))),
    case("cat", "b s!, b t!", plain(lambda x, y: torch.cat([x, y], -1))),
    case("cat of equals", "b s, b s", plain(lambda x, y: torch.cat([x, y], -1))),
    case("cat of one", "b s", plain(lambda x: torch.cat([x]))),
    case("stack", "b d, b d", plain(lambda x, y: torch.stack([x, y], -1))),
    case("stack first", "b d, b d", plain(lambda x, y: torch.stack([x, y]))),
    case("rotate half", "b d", with_sizes(lambda x, n: torch.cat([-x[..., n.d // 2 :], x[..., : n.d // 2]], -1))),
    case(
        "rope",
        "b s h e, s e",
        with_sizes(lambda x, f, n: torch.stack([x * f[:, None], x * f.sin()[:, None]], -1).flatten(3)),
    ),
    case(
        "complex rope",
        "b s h e, s e",
        plain(
            lambda x, f: torch.view_as_real(
                torch.view_as_complex(torch.stack([x, -x], -1)) * torch.polar(torch.ones_like(f), f)[:, None]
            ).flatten(3)
        ),
    ),
    case("roll", "b s", plain(lambda x: x.roll(1, -1))),
    case("flip", "b s d", plain(lambda x: x.flip(1))),
    case("tril", "b s! t!", plain(torch.tril)),
    case("triu", "s! t!", plain(lambda x: x.triu(1))),
]

INDEXING = [
    case("embedding", "v d, b s", plain(lambda w, i: F.embedding(i, w)), " v"),
    case("embedding and its sum", "v d, b", plain(lambda w, i: F.embedding(i, w).sum(0)), " v"),
    case("embedding with padding", "v d, b s", plain(lambda w, i: F.embedding(i, w, padding_idx=1)), " v"),
    case("embedding by frequency", "v d, b", plain(lambda w, i: F.embedding(i, w, scale_grad_by_freq=True)), " v"),
    case("index by rows", "v! d, b", plain(lambda x, i: x[i]), " v"),
    case("index by many rows", "v! d, b s", plain(lambda x, i: x[i]), " v"),
    case("index a middle dim", "b v d, s", plain(lambda x, i: x[:, i]), " v"),
    case("index by two", "v! v! d, b, b", plain(lambda x, i, j: x[i, j]), " vv"),
    case("index by two that broadcast", "v! v!, b 1, s", plain(lambda x, i, j: x[i, j]), " vv"),
    case("index apart", "v! s v!, b, b", plain(lambda x, i, j: x[i, :, j]), " vv"),
    case("index apart, behind", "b v! s v!, d, d", plain(lambda x, i, j: x[:, i, :, j]), " vv"),
    case("gather", "b v!, b s!", plain(lambda x, i: x.gather(1, i)), " v"),
    case("gather of a shorter", "b v", with_sizes(lambda x, n: x.gather(0, torch.zeros(1, n.v, dtype=torch.long)))),
    case("gather one a row", "b v, b 1", plain(lambda x, i: x.gather(-1, i)), " v"),
    case("take along", "b v!, b s!", plain(lambda x, i: torch.take_along_dim(x, i, 1)), " v"),
    case("take along a broadcast", "b v!, 1 s!", plain(lambda x, i: torch.take_along_dim(x, i, 1)), " v"),
    case("take along, broadcast", "1 v!, b s!", plain(lambda x, i: torch.take_along_dim(x, i, 1)), " v"),
    case("index select", "b v, s", plain(lambda x, i: x.index_select(1, i)), " v"),
    case("zeros like", "b d, b d", plain(lambda x, y: torch.zeros_like(x) + y)),
    case("ones like", "b d", plain(torch.ones_like)),
    case("full like", "b d, b d", plain(lambda x, y: torch.full_like(x, 2.0) * y)),
    case("full", "b d", with_sizes(lambda x, n: torch.full((n.b, n.d), 3.0, dtype=torch.float64) * x)),
    case("full alone", "b d", with_sizes(lambda x, n: torch.full((n.b, 4), 3.0, dtype=torch.float64))),
    case("zeros of a part", "b d", with_sizes(lambda x, n: x.new_zeros(n.b, 1) + x)),
    case("ones, summed", "b d", with_sizes(lambda x, n: (x.new_ones(n.b, n.d) * x).sum(0))),
    case("ones and their sum", "b d", with_sizes(lambda x, n: x.new_ones(n.b, n.d).sum(1) * x.sum(1))),
    case("zeros, joined", "b d", with_sizes(lambda x, n: torch.cat([x.new_zeros(n.b, 1), x], 1))),
    case("full, viewed", "b d", with_sizes(lambda x, n: torch.ones(n.b * n.d, dtype=torch.float64).view(n.b, n.d) * x)),
    case("zeros, then a softmax", "b d", with_sizes(lambda x, n: x.new_zeros(n.b, n.d).softmax(-1) * x)),
    case("zeros, then a slice", "b d", with_sizes(lambda x, n: x.new_zeros(n.b, n.d)[:, : max(1, n.d // 2)])),
    case("arange", "s d", with_sizes(lambda x, n: torch.arange(n.s, dtype=torch.float64)[:, None] * x)),
    case("causal mask", "b s s", with_sizes(lambda x, n: x + torch.full((n.s, n.s), -9.0, dtype=x.dtype).triu(1))),
    case("one hot", "b!", with_sizes(lambda i, n: F.one_hot(i, n.b)), "b"),
    case("cross entropy", "b s v, b s", plain(ss.cross_entropy), " v"),
    case("torch's cross entropy, summed", "b v!, b", plain(lambda x, i: F.cross_entropy(x, i, reduction="sum")), " v"),
    case(
        "torch's cross entropy, unreduced", "b v!, b", plain(lambda x, i: F.cross_entropy(x, i, reduction="none")), " v"
    ),
    case("torch's cross entropy", "b! v!, b!", plain(F.cross_entropy), " v"),
    case("nll by hand", "b v!, b", plain(lambda x, i: -x.log_softmax(-1).gather(1, i[:, None]).sum()), " v"),
    case("mse", "b d, b d", plain(F.mse_loss)),
    case("mse, summed", "b d, b d", plain(lambda x, y: F.mse_loss(x, y, reduction="sum"))),
    case("mse, unreduced", "b d, b d", plain(lambda x, y: F.mse_loss(x, y, reduction="none"))),
    case("l1", "b d, b d", plain(F.l1_loss)),
    case("smooth l1", "b d, b d", plain(F.smooth_l1_loss)),
    case("huber", "b d, b d", plain(lambda x, y: F.huber_loss(x, y, reduction="sum"))),
    case("binary cross entropy", "b d, b d", plain(lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid()))),
    case(
        "weighted binary cross entropy",
        "b d, b d, d, d",
        plain(
            lambda x, y, w, p: F.binary_cross_entropy_with_logits(
                x, y.sigmoid(), w.detach(), pos_weight=p.detach(), reduction="sum"
            )
        ),
        "  ++",
    ),
]

CONVOLUTIONS = [
    case("conv1d", "b i x!, o i k!", plain(lambda x, w: F.conv1d(x, w, padding=9))),
    case("conv2d", "b i x! y!, o i, o", plain(lambda x, w, c: F.conv2d(x, w[..., None, None], c))),
    case("conv2d of one image", "i x! y!, o i 1 1", plain(F.conv2d)),
    case("conv2d with a stride", "b i x! y!, o i 1 1", plain(lambda x, w: F.conv2d(x, w, stride=2))),
    case("conv2d of groups", "b g! x! y!, g! 1 1 1", with_sizes(lambda x, w, n: F.conv2d(x, w, groups=n.g))),
    case("transposed conv1d", "b i x!, i o k!", plain(F.conv_transpose1d)),
    case("average pool", "b i x! y!", plain(lambda x: F.avg_pool2d(x, 2))),
    case("adaptive average pool", "b i x! y!", plain(lambda x: F.adaptive_avg_pool2d(x, 1))),
    case("max pool", "b i x!", plain(lambda x: F.max_pool1d(x, 2))),
]

ATTENTION = [
    case("attention that broadcasts queries", "1 h s! e!, b h t! e!, b h t! e!", plain(attend)),
    case("attention that broadcasts keys", "b h s! e!, 1 h t! e!, 1 h t! e!", plain(attend)),
    case("attention of many to one head", "b h s! e!, b 1 t! e!, b 1 t! e!", plain(attend)),
    case("attention", "b h s! e!, b h t! e!, b h t! e!", plain(attend)),
    case(
        "causal attention",
        "b h s! e!, b h s! e!, b h s! e!",
        plain(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    ),
    case(
        "scaled attention",
        "b h s! e!, b h t! e!, b h t! f",
        plain(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3)),
    ),
    case(
        "attention with a mask",
        "b h s! e!, b h t! e!, b h t! e!, s! t!",
        plain(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m)),
    ),
    case(
        "attention with a mask a batch",
        "b h s! e!, b h t! e!, b h t! e!, b 1 s! t!",
        plain(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m)),
    ),
    case(
        "grouped attention",
        "b q s! e!, b k s! e!, b k s! e!",
        with_sizes(
            lambda q, k, v, n: F.scaled_dot_product_attention(
                q.repeat_interleave(1, 1), k, v, is_causal=True, enable_gqa=True
            )
        ),
    ),
    case(
        "grouped attention by hand",
        "b k r! s! e!, b k s! e!, b k s! e!",
        with_sizes(
            lambda q, k, v, n: F.scaled_dot_product_attention(q.flatten(1, 2), k, v, is_causal=True, enable_gqa=True)
        ),
    ),
    case("attention without a batch", "h s! e!, h t! e!, h t! e!", plain(attend)),
    case(
        "attention by hand",
        "b h s! e!, b h t! e!, b h t! e!",
        plain(lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v),
    ),
    case(
        "attention from projections",
        "b s! d!, h d!, h d!, h d!",
        with_sizes(
            lambda x, q, k, v, n: attend(*(F.linear(x, w).view(n.b, n.s, -1, 1).transpose(1, 2) for w in (q, k, v)))
        ),
    ),
]

CASES = POINTWISE + REDUCTIONS + CONTRACTIONS + VIEWS + INDEXING + CONVOLUTIONS + ATTENTION


def _halves(size: int) -> tuple[int, int]:
    """A size as a product of two, the first the smallest that divides."""
    return next(((p, size // p) for p in (2, 3) if size % p == 0 and size > p), (1, size))


# Trials


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@frozen
class Trial:
    """Inputs of a case on a mesh, with their layouts."""

    sizes: dict[str, int]
    inputs: tuple[Tensor, ...]
    layouts: tuple[Layout, ...]
    lengths: types.SimpleNamespace


def a_trial(rng: Random, case: Case) -> Trial:
    """Inputs for a case, and layouts that agree on its labels, but for a change now and then."""
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
        label: a_dim(rng, factors[label], free, sizes, eager=0.1 if label in rare else 0.7)
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_the_rules_accept_is_what_the_ranks_compute(case):
    """Law: op(parts of x) are parts of op(x) under the layout that the rules claim, and so are the gradients."""
    accepted = 0
    for seed in range(TRIALS):
        trial = a_trial(Random(f"{case.name} {seed}"), case)
        verdict = verdict_of(case, trial)
        assert verdict.correct, f"{trial}\n{verdict.problem}"
        accepted += verdict.accepted
    TALLY[case.name] = (accepted, TRIALS)
    assert accepted >= TRIALS // 10, "the trials say nothing where most are refused"


@given(st.sampled_from(CASES), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_so_it_is_where_hypothesis_looks(case, rng):
    """Law: the same, over all operators; a counterexample is shrunk."""
    trial = a_trial(rng, case)
    note(f"{case.name}: {trial}")
    assert not verdict_of(case, trial).problem


# Wrong rules that must not pass


def dims_only(call: Call) -> list[list[Label]]:
    return [list(range(-len(kind.layout.dims), 0)) for kind in call.types]


def softmax_of_a_part(call: Call) -> Typed:
    return unify(call, dims_only(call), dims_only(call))


def sum_that_owes_nothing(call: Call) -> Typed:
    typed = reduction.partial(call)
    return Typed(tuple(Type(Layout(kind.layout.dims)) for kind in typed.outputs), typed.consumed)


def mean_that_is_a_sum(call: Call) -> Typed:
    typed = reduction.partial(call)
    pending = tuple((axis, SUM) for axis, _ in typed.outputs[0].layout.pending)
    return Typed((Type(Layout(typed.outputs[0].layout.dims, pending)),), typed.consumed)


def amax_of_a_sum(call: Call) -> Typed:
    return unify(call, dims_only(call), [dims_only(call)[0][:-1]], linear=PRODUCT, contracted=MAX)


def product_of_two_sums(call: Call) -> Typed:
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=COPY)


def sum_of_a_sum_and_a_whole(call: Call) -> Typed:
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=PRODUCT)


def view_cut_from_the_left(call: Call) -> Typed:
    """As DTensor does: the axes of a merged dim fall to its first."""
    kind = call.types[0]
    axes = [digit for dim in kind.layout.dims for digit in dim if isinstance(digit, str)]
    dims = [(length,) if length != 1 else () for length in call.out().shape]
    degree = prod(call.sizes[axis] for axis in axes)
    if axes and call.out().shape[0] % degree == 0:
        dims[0] = merge([*axes, call.out().shape[0] // degree])
    elif axes:
        raise Refusal("SS301", "does not divide")
    return Typed((Type(Layout(tuple(dims), kind.layout.pending)),), (kind,))


def slice_at_the_global_start(call: Call) -> Typed:
    typed = view.slice_(call)
    return Typed(typed.outputs, typed.consumed, local={"start": 0, "end": ...})


def cat_of_parts(call: Call) -> Typed:
    """Parts of each laid side by side are not the parts of the whole."""
    names = dims_only(call)
    typed = unify(call, names, [[*names[0][:-1], "joined"]], out_sizes={"joined": 1})
    last = [kind.layout.dims[-1] for kind in call.types]
    axes = [digit for digit in last[0] if isinstance(digit, str)]
    if any([digit for digit in dim if isinstance(digit, str)] != axes for dim in last):
        raise Refusal("SS302", "laid out differently")
    length = call.out().shape[-1] // prod(call.sizes[axis] for axis in axes)
    dims = (*typed.outputs[0].layout.dims[:-1], merge([*axes, length]))
    return Typed((Type(Layout(dims)),), typed.consumed)


def embedding_that_owes_nothing(call: Call) -> Typed:
    typed = index.embedding(call)
    return Typed((Type(Layout(typed.outputs[0].layout.dims)),), typed.consumed, lowering=typed.lowering)


def attention_to_other_heads(call: Call) -> Typed:
    """Grouped heads laid out in another way than the queries' are not asked about."""
    names = [[f"{operand}{at}" if at == 1 else at for at in range(4)] for operand in range(3)]
    return unify(call, names, [names[0]], whole=[2, 3])


def weight_read_in_part(call: Call) -> Typed:
    """Right forward; but a whole weight that meets parts of rows owes its gradient, and this says that it does not."""
    typed = reduction.norm(call)
    pending = tuple((axis, SUM) for axis in sorted(call.types[0].layout.sharded))
    return Typed(typed.outputs, (typed.consumed[0], Type(Layout(typed.consumed[1].layout.dims, pending))))


def where_with_a_pending_condition(call: Call) -> Typed:
    return unify(call, aligned(call), [aligned_output(call.out().shape)], linear=PRODUCT)


WRONG = [
    (aten.softmax.int, softmax_of_a_part, "softmax"),
    (aten.sum.dim_IntList, sum_that_owes_nothing, "sum"),
    (aten.mean.dim, mean_that_is_a_sum, "mean"),
    (aten.amax.default, amax_of_a_sum, "amax"),
    (aten.mul.Tensor, product_of_two_sums, "square by mul"),
    (aten.add.Tensor, sum_of_a_sum_and_a_whole, "add"),
    (aten.view.default, view_cut_from_the_left, "merge"),
    (aten.view.default, view_cut_from_the_left, "cut the first"),
    (aten.slice.Tensor, slice_at_the_global_start, "slice from behind"),
    (aten.cat.default, cat_of_parts, "cat of equals"),
    (aten.embedding.default, embedding_that_owes_nothing, "embedding"),
    (aten.scaled_dot_product_attention.default, attention_to_other_heads, "grouped attention"),
    (aten.rms_norm.default, weight_read_in_part, "rms norm"),
    (aten.where.self, where_with_a_pending_condition, "where on a comparison"),
]


@pytest.mark.parametrize(
    ("target", "wrong", "name"), WRONG, ids=[f"{wrong.__name__}, {name}" for _, wrong, name in WRONG]
)
def test_a_wrong_rule_is_caught(target, wrong, name, monkeypatch):
    monkeypatch.setitem(RULES, target, wrong)
    case = next(case for case in CASES if case.name == name)
    problems = []
    for seed in range(100):
        try:
            problems.append(verdict_of(case, a_trial(Random(f"{name} {seed}"), case)).problem)
        except (RuntimeError, AssertionError, IndexError):
            continue  # caught by torch, or by an assertion, and so not silently
    assert any("holds" in problem for problem in problems), "shapes alone do not tell"


# The report


MESH = ss.Mesh(dp=2, tp=2)


def test_a_verdict_tells_the_layout_that_was_accepted():
    x, w = torch.randn(4, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    verdict = verify_operator(F.linear, [x, w], ["B@dp I@tp", "O I@tp"], MESH)
    assert verdict == Verdict(accepted=True, outputs=(Layout((("dp", 2), (8,)), (("tp", "sum"),)),))


def test_a_verdict_tells_why_an_operator_is_refused():
    verdict = verify_operator(lambda x: x.softmax(-1), [torch.randn(4, 6)], [ss.P(None, "tp")], MESH)
    assert not verdict.accepted
    assert verdict.correct
    assert verdict.refusal.startswith("SS304: softmax needs the whole of dim 1")


def test_specs_that_do_not_fit_are_an_error():
    with pytest.raises(ss.ShardingError, match="F of 5 cannot be split over tp=2"):
        verify_operator(torch.neg, [torch.randn(4, 5)], ["B F@tp"], MESH)
    with pytest.raises(ss.ShardingError, match="the spec has 1 dims"):
        verify_operator(torch.neg, [torch.randn(4, 5)], ["B"], MESH)
    with pytest.raises(ValueError, match="1 inputs, 2 layouts"):
        verify_operator(torch.neg, [torch.randn(4)], ["B", "B"], MESH)


# Found by brute force


def grouped(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def heads(*digits: int | str) -> Layout:
    return Layout(((), digits, (3,), (2,)))


@pytest.mark.parametrize(
    ("op", "shapes", "layouts_", "refused"),
    [
        # The dtype's operand was taken for an addend: what it owed was said of the result.
        (lambda x, y: x.type_as(y), [(2, 2), (4,)], [Layout(((2,), (2,))), Layout(((4,),), (("dp", "sum"),))], False),
        # A dim of two over two ranks has one row on each, and went.
        (torch.squeeze, [(2, 3)], [Layout((("tp",), (3,)))], True),
        (lambda x: x.squeeze(0), [(2, 3)], [Layout((("tp",), (3,)))], True),
        (lambda x: x.squeeze(1), [(2, 1)], [Layout((("tp",), ()))], False),
        # Head 1 of the queries' four on rank 1 is the third of all: it reads the second of the keys' two.
        (grouped, [(1, 8, 3, 2), (1, 4, 3, 2)], [heads(4, "tp"), heads(2, "tp")], True),
        (grouped, [(1, 8, 3, 2), (1, 4, 3, 2)], [heads(2, "tp", 2), heads(2, "tp")], False),
        (grouped, [(1, 8, 3, 2), (1, 4, 3, 2)], [heads("tp", 4), heads("tp", 2)], False),
        # Without elements there are no groups of dims to cut.
        (lambda x: x.view(0, 2), [(2, 0)], [Layout(((2,), (0,)))], False),
    ],
)
def test_a_found_counterexample_stays_mended(op, shapes, layouts_, refused):
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    verdict = verify_operator(op, inputs, layouts_, MESH)
    assert verdict.correct
    assert verdict.accepted == (not refused)


# What is right is accepted


@pytest.mark.parametrize(
    ("name", "specs", "outputs"),
    [
        ("add of a vector", ["B@dp S@cp D@tp", "D@tp"], "[2@dp, 2@cp, 2@tp]"),
        ("linear", ["B@dp S@cp I", "O@tp I"], "[2@dp, 2@cp, 2@tp]"),
        ("linear", ["B@dp S@cp I@tp", "O I@tp"], "[2@dp, 2@cp, 4] +tp"),
        ("linear with a bias", ["B@dp I@tp", "O I@tp", "O +tp"], "[2@dp, 4] +tp"),
        ("gated", ["B@dp D", "F@tp D", "F@tp D", "D F@tp"], "[2@dp, 4] +tp"),
        ("fused projection", ["B@dp D", "(2 F@tp) D"], "[2@dp, 1@tp], [2@dp, 1@tp]"),
        ("rms norm", ["B@dp S@(cp,tp) D", "D"], "[2@dp, cp.tp, 4]"),
        ("merge", ["B@dp S@cp D@tp"], "[dp.2.cp.2, 2@tp]"),
        ("there and back", ["B@dp S@cp D"], "[2@dp, 2@cp, 4]"),
        ("transpose and merge", ["B@dp H@tp S E"], "[2@dp, 4, 8@tp]"),
        ("expand and meet", ["B@dp 1 D", "B@dp S@cp D"], "[2@dp, 2@cp, 4]"),
        ("expand by a new dim and meet", ["D@tp", "B@dp S@cp D@tp"], "[2@dp, 2@cp, 2@tp]"),
        ("expand, merge and meet", ["B@dp 1 D", "B@dp S@cp D"], "[2@dp, 2@cp, 4]"),
        ("repeated heads, merged", ["B@dp K@tp E"], "[2@dp, 4@tp, 4]"),
        ("repeat by a new dim and meet", ["D", "B@dp S@cp D"], "[2@dp, 2@cp, 4]"),
        ("full", ["B@dp D@tp"], "[2@dp, 2@tp]"),
        ("full, viewed", ["B@dp D@tp"], "[2@dp, 2@tp]"),
        ("embedding", ["V@tp D", "B@dp S@cp"], "[2@dp, 2@cp, 4] +tp"),
        ("gather", ["B@dp V", "B@dp S@cp"], "[2@dp, 2@cp]"),
        ("cross entropy", ["B@dp S@cp V@tp", "B@dp S@cp"], "[] +cp +dp, [] +cp +dp"),
        ("causal attention", ["B@dp H@tp S E", "B@dp H@tp S E", "B@dp H@tp S E"], "[2@dp, 2@tp, 4, 4]"),
        ("attention of many to one head", ["B@dp H@tp S E", "B@dp 1 T E", "B@dp 1 T E"], "[2@dp, 2@tp, 4, 4]"),
        ("rope", ["B@dp S@cp H@tp E", "S@cp E"], "[2@dp, 2@cp, 2@tp, 8]"),
        ("mean", ["B@dp S@cp D"], "[2@dp, 4] +cp:avg"),
        ("where", ["B@dp D@tp", "B@dp D@tp", "B@dp D@tp"], "[2@dp, 2@tp]"),
        ("causal mask", ["B@dp S S"], "[2@dp, 4, 4]"),
        ("conv2d", ["B@dp I@tp X Y", "O I@tp", "O +tp"], "[2@dp, 4, 4, 4] +tp"),
    ],
)  # fmt: skip
def test_what_llama_like_models_do_is_accepted(name, specs, outputs):
    """Each dim is of 4 (a fused one of 4 too); the layouts of the results are written by hand."""
    case = next(case for case in CASES if case.name == name)
    operands = [operand.replace("!", "").split() for operand in case.labels.split(",")]
    lengths = types.SimpleNamespace(**dict.fromkeys({label for operand in operands for label in operand} - {"1"}, 4))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        fill([1 if label == "1" else 4 for label in operand], (case.make + " " * 9)[number], lengths, generator)
        for number, operand in enumerate(operands)
    ]
    mesh = ss.Mesh(dp=2, cp=2, tp=2)
    verdict = verify_operator(lambda *tensors: case.op(tensors, lengths), inputs, specs, mesh)
    assert verdict.accepted, verdict.refusal
    assert verdict.correct, verdict.problem
    assert ", ".join(map(str, verdict.outputs)) == outputs
