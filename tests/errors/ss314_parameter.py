"""A write to a parameter."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import ClampsItsWeight


def trigger():
    Case(model=with_parts(feed_forward=ClampsItsWeight)).compile()
