"""A division by a local width."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import DividedByItsWidth


def trigger():
    Case(model=with_parts(feed_forward=DividedByItsWidth)).compile()
