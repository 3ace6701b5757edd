"""A branch on a local width."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import BranchOnWidth


def trigger():
    Case(model=with_parts(feed_forward=BranchOnWidth)).compile()
