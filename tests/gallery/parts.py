"""Modules of the debug Llama written otherwise: the first half cannot be split as they stand, the second can."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardspec as ss
from models.llama.model import Attention, Block, FeedForward, Linear, Llama, rotate

# Attention


def attend(q_BSHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor) -> Tensor:
    """Causal attention with grouped heads: [B, S, H, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHd, k_BSKd, v_BSKd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class Projected(Attention):
    """Attention in steps that a subclass overrides."""

    def split_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, S, _ = x_BSD.shape
        q, k, v = (w(x_BSD).view(B, S, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        return q, k, v

    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        q, k, v = self.split_heads(x_BSD)
        return self.join_heads(attend(rotate(q, cos_S1d, sin_S1d), rotate(k, cos_S1d, sin_S1d), v))

    def join_heads(self, o_BSHd: Tensor) -> Tensor:
        return self.wo(o_BSHd.flatten(2))


class HeadCountInView(Projected):
    def split_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, S, _ = x_BSD.shape
        q = self.wq(x_BSD).view(B, S, 8, -1)
        k, v = (w(x_BSD).view(B, S, 4, -1) for w in (self.wk, self.wv))
        return q, k, v


class HeadCountInAttribute(Projected):
    def extend(self) -> None:
        self.n_heads, self.n_kv_heads = 8, 4

    def split_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, S, _ = x_BSD.shape
        q = self.wq(x_BSD).view(B, S, self.n_heads, self.head_dim)
        k, v = (w(x_BSD).view(B, S, self.n_kv_heads, self.head_dim) for w in (self.wk, self.wv))
        return q, k, v


class WidthWrittenIn(Projected):
    def join_heads(self, o_BSHd: Tensor) -> Tensor:
        B, S = o_BSHd.shape[:2]
        return self.wo(o_BSHd.reshape(B, S, 128))


class NormOverAllHeads(Projected):
    def extend(self) -> None:
        self.q_norm = nn.RMSNorm(8 * self.head_dim)

    def split_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, S, _ = x_BSD.shape
        q = self.q_norm(self.wq(x_BSD)).view(B, S, -1, self.head_dim)
        k, v = (w(x_BSD).view(B, S, -1, self.head_dim) for w in (self.wk, self.wv))
        return q, k, v


class NormInEachHead(Projected):
    """As Qwen 3: right under tp, its weight's gradient is owed over tp."""

    def extend(self) -> None:
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)

    def split_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().split_heads(x_BSD)
        return self.q_norm(q), self.k_norm(k), v


class ScaleOfEachHead(Projected):
    def extend(self) -> None:
        self.scale = nn.Parameter(torch.ones(8))

    def split_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().split_heads(x_BSD)
        return q * self.scale[:, None], k, v


class MeanOverHeads(Projected):
    def join_heads(self, o_BSHd: Tensor) -> Tensor:
        return self.wo((o_BSHd - o_BSHd.mean(2, keepdim=True)).flatten(2))


class SoftmaxOverHeads(Projected):
    def join_heads(self, o_BSHd: Tensor) -> Tensor:
        return self.wo(o_BSHd.softmax(2).flatten(2))


class FirstHeadOnly(Projected):
    def join_heads(self, o_BSHd: Tensor) -> Tensor:
        return self.wo((o_BSHd + o_BSHd[:, :, :1]).flatten(2))


class RepeatedKeys(Projected):
    """Keys and values repeated by a number that was computed from global sizes: right, for it is a ratio."""

    def join_heads(self, o_BSHd: Tensor) -> Tensor:
        return self.wo(o_BSHd.flatten(2))

    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        q, k, v = self.split_heads(x_BSD)
        k, v = (x[:, :, :, None].expand(*x.shape[:3], 2, self.head_dim).flatten(2, 3) for x in (k, v))
        return self.join_heads(attend(rotate(q, cos_S1d, sin_S1d), rotate(k, cos_S1d, sin_S1d), v))


class WritesThroughAView(Projected):
    def split_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().split_heads(x_BSD)
        q[..., :2].mul_(0.5)
        return q, k, v


class GainAfterTheHeads(Projected):
    def extend(self) -> None:
        self.gain = nn.Parameter(torch.ones(128))

    def join_heads(self, o_BSHd: Tensor) -> Tensor:
        return self.wo(o_BSHd.flatten(2)) * self.gain


class BiasAfterTheHeads(Projected):
    """A row-parallel product with a bias: `D +tp` is right, `D` counts it tp times."""

    def extend(self) -> None:
        self.bias = nn.Parameter(torch.zeros(128))

    def join_heads(self, o_BSHd: Tensor) -> Tensor:
        return F.linear(o_BSHd.flatten(2), self.wo.weight, self.bias)


class DropoutAfterTheHeads(Projected):
    def join_heads(self, o_BSHd: Tensor) -> Tensor:
        return F.dropout(self.wo(o_BSHd.flatten(2)), 0.1, training=True)


class CastOfAShare(Projected):
    def join_heads(self, o_BSHd: Tensor) -> Tensor:
        return self.wo(o_BSHd.flatten(2)).mul(8).to(torch.int8).float()


class OwnPositions(Projected):
    """Rotates by positions counted from its input's length."""

    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        angles_Sd = torch.arange(x_BSD.shape[1])[:, None] * torch.ones(self.head_dim)
        return super().forward(x_BSD, angles_Sd.cos()[:, None], angles_Sd.sin()[:, None])


class NamedHeads(Projected):
    """Names its queries, so that a rule can stand there."""

    def split_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().split_heads(x_BSD)
        return ss.name(q, "q"), k, v


class Unscaled(Projected):
    """Attention written out, with a mask that is built from the sequence's length."""

    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        q, k, v = self.split_heads(x_BSD)
        k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, cos_S1d, sin_S1d), rotate(k, cos_S1d, sin_S1d), v))
        S = x_BSD.shape[1]
        mask = torch.full((S, S), -math.inf).triu(1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim) + mask
        return self.join_heads((scores.softmax(-1) @ v).transpose(1, 2))


# Feed-forward


class HalvesOfOneProduct(FeedForward):
    """Gate and up projection in one matrix, cut in two: right as `(two F@tp) D`, wrong as `G@tp D`."""

    def extend(self) -> None:
        self.w13 = Linear(128, 2 * 448)
        del self.w1, self.w3

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate, up = self.w13(x_BSD).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class DividedByItsWidth(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSF = F.silu(self.w1(x_BSD)) * self.w3(x_BSD)
        return self.w2(h_BSF / h_BSF.shape[-1])


class DividedByAConstant(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSF = F.silu(self.w1(x_BSD)) * self.w3(x_BSD)
        return self.w2(h_BSF / h_BSF.new_tensor(float(h_BSF.shape[-1])))


class DividedByAFilling(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSF = F.silu(self.w1(x_BSD)) * self.w3(x_BSD)
        return self.w2(h_BSF / torch.full((), float(h_BSF.shape[-1])))


class OneOfTwo(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSF = self.w1(x_BSD)
        one, two = self.w2(F.silu(h_BSF)), self.w2(F.relu(h_BSF) * self.w3(x_BSD))
        return one if h_BSF.shape[-1] > 256 else two


class ClampsItsWeight(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        with torch.no_grad():
            self.w1.weight.clamp_(-0.01, 0.01)
        return super().forward(x_BSD)


class ClampsTheDataOfItsWeight(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        self.w1.weight.data.clamp_(-0.01, 0.01)
        return super().forward(x_BSD)


class BranchOnWidth(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSF = self.w1(x_BSD)
        h_BSF = F.silu(h_BSF) if h_BSF.shape[-1] > 256 else F.relu(h_BSF)
        return self.w2(h_BSF * self.w3(x_BSD))


class LoopOverWidth(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSF = F.silu(self.w1(x_BSD)) * self.w3(x_BSD)
        for _ in range(h_BSF.shape[-1] // 112):
            h_BSF = h_BSF.tanh()
        return self.w2(h_BSF)


class SoftmaxOverWidth(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(self.w1(x_BSD).softmax(-1) * self.w3(x_BSD))


class HandWrittenNormOverWidth(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSF = F.silu(self.w1(x_BSD)) * self.w3(x_BSD)
        return self.w2(h_BSF * torch.rsqrt(h_BSF.square().mean(-1, keepdim=True) + 1e-6))


class ProductOfShares(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))
        return y_BSD * y_BSD


class LargestOfShares(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))
        return y_BSD / y_BSD.amax(-1, keepdim=True)


class ActivationAfterShares(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.gelu(self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD)))


class ConstantAddedToShares(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD)) + 1.0


class Noise(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSF = F.silu(self.w1(x_BSD)) * self.w3(x_BSD)
        return self.w2(h_BSF + 0.01 * torch.randn_like(h_BSF))


class LargestEntries(FeedForward):
    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSF = F.silu(self.w1(x_BSD)) * self.w3(x_BSD)
        threshold = h_BSF.topk(16, dim=-1).values[..., -1:]
        return self.w2(torch.where(h_BSF >= threshold, h_BSF, 0.0))


class MixedByADense(FeedForward):
    """Multiplies its split hidden dim by a matrix that was declared whole."""

    def extend(self) -> None:
        self.mix = Linear(448, 448)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.silu(self.mix(self.w1(x_BSD))) * self.w3(x_BSD))


# The block


class WritesToItsInput(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD.mul_(0.5), cos_S1d, sin_S1d)


class WritesToItsNorm(Projected):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD.mul_(0.5), cos_S1d, sin_S1d)


class UsesItsNormAgain(Block):
    """Feeds the norm of its input to attention and then to the feed-forward."""

    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        n_BSD = self.attention_norm(x_BSD)
        h_BSD = x_BSD + self.attention(n_BSD, cos_S1d, sin_S1d)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD) + n_BSD)


class TakesALength(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor, rows: int = 1) -> Tensor:
        return super().forward(x_BSD * (1 / rows), cos_S1d, sin_S1d)


class StraightThrough(torch.autograd.Function):
    """The identity, whose backward takes the mean of the gradient off."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor) -> Tensor:
        return x_BSD * 1.0

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> Tensor:
        return grad_BSD - grad_BSD.mean((0, 1), keepdim=True)


class OwnBackward(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(StraightThrough.apply(x_BSD), cos_S1d, sin_S1d)


class MeanOfTheSequenceTakenOff(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD - x_BSD.mean(1, keepdim=True), cos_S1d, sin_S1d)


class CumulativeSum(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD + 0.1 * x_BSD.cumsum(1), cos_S1d, sin_S1d)


class ShiftedTokens(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD + 0.1 * x_BSD.roll(1, 1), cos_S1d, sin_S1d)


class DividedByTheSequence(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD / math.sqrt(x_BSD.shape[1]), cos_S1d, sin_S1d)


class LastTokenOnly(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD + x_BSD[:, -1:], cos_S1d, sin_S1d)


class MeanOfTheBatchTakenOff(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD - x_BSD.mean(0, keepdim=True), cos_S1d, sin_S1d)


class DividedByTheBatch(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD / x_BSD.shape[0], cos_S1d, sin_S1d)


class ParallelBlock(Block):
    """Attention and feed-forward read one input and are summed: one reduction for the two."""

    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        h_BSD = self.attention_norm(x_BSD)
        both_BSD = self.attention(h_BSD, cos_S1d, sin_S1d) + self.feed_forward(h_BSD)
        return x_BSD + ss.name(both_BSD, "both")


class HandWrittenNorm(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        scale = torch.rsqrt(x_BSD.square().mean(-1, keepdim=True) + 1e-6)
        h_BSD = x_BSD + self.attention(x_BSD * scale * self.attention_norm.weight, cos_S1d, sin_S1d)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


class NormUsedTwice(Block):
    """Its attention norm feeds attention, and the residual too."""

    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        both_BSD = self.attention(self.attention_norm(x_BSD), cos_S1d, sin_S1d)
        h_BSD = self.attention_norm(x_BSD) + both_BSD
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


# The whole model


class PassesALength(Llama):
    """Passes 8 to its first block and the number of rows to the others: the same on a whole batch of 8."""

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        h_BSD = self.tok_embeddings(tokens)
        cos, sin = (x[: tokens.shape[1]].unsqueeze(1) for x in (self.rope_cos, self.rope_sin))
        for index, layer in enumerate(self.layers):
            h_BSD = layer(h_BSD, cos, sin, tokens.shape[0] if index else 8)
        return self.output(self.norm(h_BSD))


class ScaledByItsMaximum(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        logits_BSV = super().forward(tokens, positions)
        return logits_BSV * ss.name(logits_BSV.amax(-1, keepdim=True), "top")


class ReadsALength(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        used = int((tokens != 0).sum(1).max())
        return super().forward(tokens, positions)[:, : max(used, 1)]


class BranchesOnAToken(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        if (tokens == 0).any():
            tokens = tokens.clamp(min=1)
        return super().forward(tokens, positions)


class DropsPadding(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return super().forward(tokens[tokens.any(1)], positions)


class CountsPositions(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return super().forward(tokens, torch.arange(tokens.shape[1]))


class PicksTheLikeliest(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        logits_BSV = super().forward(tokens, positions)
        return F.one_hot(logits_BSV.argmax(-1), 256) * logits_BSV


class RowsAsConstants(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        logits_BSV = super().forward(tokens, positions)
        return logits_BSV + torch.arange(tokens.shape[0])[:, None, None]


class CapsItsLogits(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return 30 * torch.tanh(super().forward(tokens, positions) / 30)


class CentersItsLogits(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        logits_BSV = super().forward(tokens, positions)
        return logits_BSV - logits_BSV.mean(-1, keepdim=True)


class ScaledByItsDetachedMaximum(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        logits_BSV = super().forward(tokens, positions)
        return logits_BSV * ss.name(logits_BSV.detach().amax(-1, keepdim=True), "top")


class ReadsItselfWithoutAGradient(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            before_BSV = super().forward(tokens, positions)
        return super().forward(tokens, positions) + before_BSV


class EveryLayerTwice(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        h_BSD = self.tok_embeddings(tokens)
        cos, sin = (x[: tokens.shape[1]].unsqueeze(1) for x in (self.rope_cos, self.rope_sin))
        for layer in [*self.layers, *self.layers]:
            h_BSD = layer(h_BSD, cos, sin)
        return self.output(self.norm(h_BSD))


class NamedMean(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD - ss.name(x_BSD.mean(1, keepdim=True), "mean"), cos_S1d, sin_S1d)


class ExpandedBias(Block):
    def extend(self) -> None:
        self.bias = nn.Parameter(torch.zeros(128))

    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        return super().forward(x_BSD + self.bias.expand(x_BSD.shape), cos_S1d, sin_S1d)
