"""A drop of a pattern that the table does not have."""

from models.llama.rules import RULES


def trigger():
    RULES.override(drop=[r"layers\.\d+\.attention\.wo"])
