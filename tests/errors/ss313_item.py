"""A value of the batch that Python reads."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import BranchesOnAToken


def trigger():
    Case(model=with_parts(model=BranchesOnAToken)).compile()
