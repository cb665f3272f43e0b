"""Hypothesis' settings: no deadline for an example, because a machine that tests much at once is slow now and then."""

from hypothesis import settings

settings.register_profile("wooly", deadline=None, print_blob=True)
settings.load_profile("wooly")
