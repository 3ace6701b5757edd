"""A rule for biases that the model does not have."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"layers\.\d+\.attention\.w[qkv]\.bias": "(H@tp hd)@fsdp"})
    Case(rules=rules).compile()
