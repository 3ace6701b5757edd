"""A write to what `fully_shard` hands on as a view."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import WritesToItsInput


def trigger():
    Case(model=with_parts(block=WritesToItsInput)).compile()
