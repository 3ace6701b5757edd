"""Each layer leaves a tensor in an attribute, and the model adds it up."""

import torch
from torch import Tensor

from models.llama.model import Block, Llama
from tests.gallery.case import Case, with_parts


class KeepsItsSize(Block):
    def forward(self, x_BSD: Tensor, cos_S1d: Tensor, sin_S1d: Tensor) -> Tensor:
        out_BSD = super().forward(x_BSD, cos_S1d, sin_S1d)
        self.size = out_BSD.pow(2).sum()
        return out_BSD


class AddsTheSizes(Llama):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        logits_BSV = super().forward(tokens, positions)
        return logits_BSV + torch.stack([layer.size for layer in self.layers]).sum()


def trigger():
    Case(model=with_parts(model=AddsTheSizes, block=KeepsItsSize)).compile()
