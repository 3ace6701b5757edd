"""A batch without what forward needs."""

import torch

from tests.gallery.case import Case


def trigger():
    Case(inputs={"labels": torch.zeros(8, 128, dtype=torch.long)}, loss=None).compile()
