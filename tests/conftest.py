"""Which tests are played, and how they are shared out among worker processes (pytest-xdist)."""

import os

import pytest

from tests.host.scripts import sweeps


def pytest_configure(config):
    """Share the cores among the workers: before torch is imported, and for the hosts the tests start as well."""
    config.pluginmanager.register(sweeps)
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file on one worker, and a file of tests that run inside a host: each has fixtures, or a process, that
    would be made twice.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path, _, test = nodeid.partition("::")
            return f"{path}::{test.partition('-')[0]}" if test.startswith("test_inside[") else path

    return ByFile(config, log)
