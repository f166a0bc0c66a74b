"""How the tests are shared out among worker processes (pytest-xdist)."""

import os
from pathlib import Path

import pytest


def pytest_configure():
    """Share the cores among the workers: before torch is imported, and for the hosts the tests start as well."""
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


def pytest_collection_modifyitems(items):
    """Keep a file on one worker, and a file of tests that run inside a host: each has fixtures, or a process, that would be made twice."""
    for item in items:
        inside = getattr(item, "callspec", None) and item.callspec.params.get("inside")
        path = inside[0] if inside else item.path
        item.add_marker(pytest.mark.xdist_group(path.relative_to(Path(__file__).parent).as_posix()))
