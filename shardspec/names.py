"""The names of parameters and activations, with what repeats folded. Imports no torch."""

import re

INDEX = re.compile(r"(?:(?<=\.)|^)[0-9]+(?=[.:]|$)")
"""An index in a name: `0` in `layers.0.attention` and in `layers.0:in`."""


def fold(name: str) -> str:
    """A name with its indices as `*`: names that differ in them alone are told of together."""
    return INDEX.sub("*", name)


def block_of(folded: str) -> tuple[str, str]:
    """A folded name as its repeated block and the rest: ("layers.*", "attention.wq.weight").

    The rest is empty for the block itself; the block is empty for what is in none. What stands behind a colon, as in
    `layers.*:in`, belongs to the rest.
    """
    path, colon, port = folded.partition(":")
    parts = path.split(".")
    if "*" not in parts:
        return "", folded
    cut = parts.index("*") + 1
    return ".".join(parts[:cut]), ".".join(parts[cut:]) + colon + port
