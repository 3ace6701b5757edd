"""`make test` gives one answer for one commit: hypothesis draws the same examples, with no limit on time."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
