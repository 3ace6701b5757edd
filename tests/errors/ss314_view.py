"""A write through a view."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import WritesThroughAView


def trigger():
    Case(model=with_parts(attention=WritesThroughAView)).compile()
