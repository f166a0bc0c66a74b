"""Settings of the core tests."""

from hypothesis import settings

# How long an example takes says nothing about the code on a busy machine; 40 of them keep the core tests short.
settings.register_profile("asdm", deadline=None, max_examples=40)
settings.load_profile("asdm")
