"""What all tiers share."""

from hypothesis import settings

# The machines that run the tests are slow at times; a property that is true slowly is still true.
settings.register_profile("project", deadline=None)
settings.load_profile("project")
