"""What many files of tests/host/inside need; a file that wants one of these otherwise defines its own."""

import pytest
import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def loaded(folder):
    """A MODEL as the stock loader gives it."""
    return small.model(folder)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded


@pytest.fixture(scope="module")
def plain_samples(loaded):
    return small.sample(loaded)


@pytest.fixture(scope="module")
def m2(folder):
    return small.write_pack(folder / "m2.safetensors", seed=1)


@pytest.fixture(scope="module")
def combined(folder):
    """The file of the same weights as `model` with `m2`, as a MODEL."""
    return small.combined(folder)
