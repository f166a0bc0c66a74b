"""Settings of the core tests, and what several of them need."""

import pytest
from hypothesis import settings

from asdm_core.architecture import FAMILIES
from tests.core.narrow import CONFIGS

# How long an example takes says nothing about the code on a busy machine; 40 of them keep the core tests short.
settings.register_profile("asdm", deadline=None, max_examples=40)
settings.load_profile("asdm")


@pytest.fixture
def known(monkeypatch):
    """Narrow UNets without a description are recognised, as those of the published widths are."""
    for config in CONFIGS.values():
        monkeypatch.setitem(FAMILIES, config.family, config)
