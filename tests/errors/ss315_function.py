"""A backward of one's own."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import OwnBackward


def trigger():
    Case(model=with_parts(block=OwnBackward)).compile()
