"""Settings of the core tests."""

from hypothesis import settings

# How long an example takes says nothing about the code on a busy machine.
settings.register_profile("asdm", deadline=None)
settings.load_profile("asdm")
