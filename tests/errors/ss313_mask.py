"""Rows picked by a mask: a shape that depends on values."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import DropsPadding


def trigger():
    Case(model=with_parts(model=DropsPadding)).compile()
