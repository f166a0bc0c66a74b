"""Fixtures for tests against a real ComfyUI, which always runs in a child process.

Nothing here skips but test_second_device.py, where there is no C++ compiler, and then `.ci/run` fails: a host that
cannot be had is a failure.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import bootstrap
from demo.server import Client, Server
from tests.host.forks import Forks

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Mark the tests of this folder, and run them after the quick ones: last the many short files of test_inside.py, so
    that no worker is left alone with a long one.
    """
    ours = [item for item in items if item.path.is_relative_to(FOLDER)]
    for item in ours:
        item.add_marker("host")
    ours.sort(key=lambda item: item.path.name == "test_inside.py")
    items[:] = [item for item in items if not item.path.is_relative_to(FOLDER)] + ours


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show the end of the host's log under a test that failed with the server."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and server is not None:
        report.sections.append(("ComfyUI's log, its end", server.log()))
    return report


@pytest.fixture(scope="session")
def host() -> Path:
    """The folder of the ComfyUI under test."""
    return bootstrap.host_path()


@pytest.fixture(scope="session")
def server(host, tmp_path_factory) -> Iterator[Server]:
    """A running ComfyUI with this pack, one for all tests; its folders lie under `server.base`."""
    with Server(host, tmp_path_factory.mktemp("comfyui"), flags=["--cpu", "--disable-api-nodes"]) as running:
        yield running


@pytest.fixture
def client(server) -> Iterator[Client]:
    """A client for the server. What a test left in the queue is dropped after it."""
    client = Client(server.url)
    yield client
    if server.alive:
        client.request("/queue", {"clear": True})
        client.interrupt()


@pytest.fixture(scope="session")
def forks(host) -> Iterator[Forks]:
    """Host processes that begin with ComfyUI imported, one after another."""
    running = Forks(host, ["--cpu", "--use-pytorch-cross-attention"])
    yield running
    running.close()


@pytest.fixture(scope="session")
def call_in_host(forks):
    """call_in_host(folder, script, function, ...): run_in_host with a folder of the caller's."""
    return forks.call


@pytest.fixture(scope="session")
def random_family(call_in_host, tmp_path_factory) -> Path:
    """A models folder with a family of random weights in the form of the embedded one; see scripts/family.py."""
    folder = tmp_path_factory.mktemp("family")
    call_in_host(folder, "family.py", "main", str(folder / "models"))
    return folder / "models"


@pytest.fixture
def run_in_host(call_in_host, tmp_path):
    """Run a function of a script inside a host process: run_in_host("models.py", "prune", "m2", seed=1).

    The script lies in tests/host/scripts; arguments and the value returned are JSON.
    See runner.py for what the script finds around it.
    """
    return functools.partial(call_in_host, tmp_path)
