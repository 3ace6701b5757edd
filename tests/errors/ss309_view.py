"""A head count in a view."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import HeadCountInView


def trigger():
    Case(model=with_parts(attention=HeadCountInView)).compile()
