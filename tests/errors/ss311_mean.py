"""A mean over tokens that are split."""

import torch.nn.functional as F

from models.llama.rules import WITHOUT_SP
from tests.gallery.case import Case


def loss(output, batch):
    return F.cross_entropy(output.flatten(0, 1), batch["labels"].flatten()), 1


def trigger():
    rules = WITHOUT_SP.override(params={r"output\.weight": "V@fsdp D"}, activations={r"output": "B@(dp,fsdp) S@cp V"})
    Case(rules=rules, loss=loss).compile()
