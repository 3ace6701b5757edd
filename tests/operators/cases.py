"""Operators as labelled cases, from which random trials are drawn: what the rules' property tests run on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

import shardspec as ss


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
    case("scaled by a 0-dim", "b s, ", plain(torch.mul)),
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
    case("nll, summed", "b v!, b", plain(lambda x, i: F.nll_loss(x, i, reduction="sum")), " v"),
    case("nll, unreduced", "b v!, b", plain(lambda x, i: F.nll_loss(x, i, reduction="none")), " v"),
    case("nll", "b! v!, b!", plain(F.nll_loss), " v"),
    case("nll, weighted", "b v!, b, v!", plain(lambda x, i, w: F.nll_loss(x, i, w.detach(), reduction="sum")), " v +"),
    case("nll of rows", "b v! s, b s", plain(lambda x, i: F.nll_loss(x, i, reduction="sum")), " v"),
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
SPATIAL_AND_SCATTER = [
    case("where of two sums", "b d, b d, b d", plain(lambda c, x, y: torch.where(c, x, y) * 2.0), "?  "),
    case("pad of the last", "b s d!", plain(lambda x: F.pad(x, (1, 2)))),
    case("pad with a number", "b s d!", plain(lambda x: F.pad(x, (1, 0), value=3.0))),
    case("pad of a middle dim", "b s! d", plain(lambda x: F.pad(x, (0, 0, 1, 0)))),
    case("crop by a pad", "b d!", plain(lambda x: F.pad(x, (-1, 1)))),
    case("reflected", "b c x!", plain(lambda x: F.pad(torch.cat([x, x], -1), (1, 2), mode="reflect"))),
    case("replicated edge", "b c x! y!", plain(lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"))),
    case("nearest", "b c x! y!", plain(lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))),
    case("bilinear", "b c x! y!", plain(lambda x: F.interpolate(x, size=(3, 5), mode="bilinear"))),
    case("bicubic", "b c x! y!", plain(lambda x: F.interpolate(x, size=(3, 4), mode="bicubic", align_corners=True))),
    case("linear resampling", "b c x!", plain(lambda x: F.interpolate(x, scale_factor=1.5, mode="linear"))),
    case("pixel shuffle", "b c! x! y!", plain(lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2))),
    case("windows", "b x!", plain(lambda x: torch.cat([x, x], -1).unfold(-1, 2, 1))),
    case("patches", "b c! x! y!", plain(lambda x: F.unfold(x, 2, padding=1))),
    case(
        "sampled",
        "b c x! y!, b u v t!",
        plain(lambda x, g: F.grid_sample(x, g[..., :1].repeat(1, 1, 1, 2), align_corners=False)),
    ),
    case("spectrum", "b s!", plain(lambda x: torch.fft.rfft(x).abs())),
    case("spectrum and back", "b s! d", plain(lambda x: torch.fft.ifft(torch.fft.fft(x, dim=1), dim=1).real)),
    case("group norm", "b c! x, c!, c!", plain(lambda x, w, c: F.group_norm(x, 1, w, c))),
    case(
        "batch norm, fixed", "b c x!, c, c", plain(lambda x, m, v: F.batch_norm(x, m.detach(), v.detach().abs() + 1.0))
    ),
    case(
        "batch norm of a batch",
        "b! c x!, c, c",
        plain(lambda x, w, c: F.batch_norm(x, None, None, w, c, training=True)),
    ),
    case("instance norm", "b c x! y!", plain(lambda x: F.instance_norm(torch.cat([x, x + 1.0], -1)))),
    case("scatter of numbers", "b v!, b s!", plain(lambda x, i: x.scatter(1, i, 0.0)), " v"),
    case(
        "scatter of another number", "b v!, b s!", plain(lambda x, i: torch.zeros_like(x).scatter_(1, i, 1.0) * x), " v"
    ),
    case("scatter in part", "b! v!, 1 1", plain(lambda x, i: x.scatter(0, i, 0.0)), " b"),
    case("scatter add", "b v!, b s!, b s!", plain(lambda x, i, y: x.scatter_add(1, i, y)), " v "),
    case("scatter add in place", "b v!, b s!, b s!", plain(lambda x, i, y: x.clone().scatter_add_(1, i, y)), " v "),
    case("index add", "v! d, s!, s! d", plain(lambda x, i, y: x.index_add(0, i, y)), " v "),
    case("index add in place", "v! d, s!, s! d", plain(lambda x, i, y: torch.zeros_like(x).index_add_(0, i, y)), " v "),
    case("index fill", "b v!, s!", plain(lambda x, i: x.index_fill(1, i, 0.0)), " v"),
    case("copy in place", "b d, b d", plain(lambda x, y: x.clone().copy_(y))),
    case("copy of a row in place", "b d, d", plain(lambda x, y: x.clone().copy_(y))),
    case("fill in place", "b d", plain(lambda x: x.clone().fill_(2.0))),
    case("zero in place", "b d", plain(lambda x: x.clone().zero_())),
    case("masked fill in place", "b d, d", plain(lambda x, m: x.clone().masked_fill_(m, 0.0)), " ?"),
    case("diagonal", "b s! s!", plain(lambda x: x.diagonal(0, 1, 2))),
    case("nansum", "b s", plain(lambda x: x.nansum(1))),
    case("sum of magnitudes", "b s", plain(lambda x: torch.linalg.vector_norm(x, 1, dim=1))),
    case("largest magnitude", "b s", plain(lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1))),
    case("count as a number", "b s, v", plain(lambda i, v: (i > 0).sum(1).to(torch.float64) * 2.0), "v "),
    case("count", "b s", plain(lambda x: x.relu().count_nonzero(1))),
    case("running maximum", "b s!", plain(lambda x: x.cummax(1))),
    case("median of all", "b! s!", plain(torch.median)),
    case("any of two dims", "b s! d!", plain(lambda x: x.any((1, 2))), "?"),
    case("variance and mean", "b s", plain(lambda x: torch.var_mean(x, 1, correction=0))),
    case("stable sort", "b s!", plain(lambda x: x.sort(dim=1, stable=True))),
    case("hard swish", "b d", plain(F.hardswish)),
    case("log sigmoid", "b d", plain(F.logsigmoid)),
    case("prelu", "b c d, c", plain(F.prelu)),
    case("floor divide", "b d", plain(lambda x: x.detach() // 2)),
    case(
        "binary cross entropy of probabilities",
        "b d, b d",
        plain(lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid().detach())),
    ),
    case(
        "average pool of whole numbers",
        "b c v!, v",
        with_sizes(lambda i, v, n: F.avg_pool1d(i.double(), 2).long() if n.v > 1 else i),
        "v ",
    ),
    case("frexp", "b d", plain(torch.frexp)),
    case("0-dim reductions", ", ", plain(lambda x, y: (x.softmax(0), x.sum(0), y.cumsum(0), y.amax(-1), x.sort(0)))),
    case("a 0-dim bias", ", m k!, k! n", plain(torch.addmm)),
]

CASES = POINTWISE + REDUCTIONS + CONTRACTIONS + VIEWS + INDEXING + CONVOLUTIONS + ATTENTION + SPATIAL_AND_SCATTER


def _halves(size: int) -> tuple[int, int]:
    """A size as a product of two, the first the smallest that divides."""
    return next(((p, size // p) for p in (2, 3) if size % p == 0 and size > p), (1, size))
