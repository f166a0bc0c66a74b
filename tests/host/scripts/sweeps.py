"""Sweeps: test functions of many cases, of which `make test` plays some and `make test ALL=1` all.

    @pytest.mark.sweep(6)  # of its cases 6, spread evenly
    @pytest.mark.sweep(0)  # none: what it costs is much, and other tests see most of what it sees

A plugin of both pytests: the outer one, and the one that runs within the host (inside.py). What is left out is
deselected, never skipped, and is counted at the end.
"""

import os
from collections import Counter

import pytest

LEFT_OUT: dict[str, int] = {}  # test function -> cases


def everything() -> bool:
    """Whether all cases are asked for, as `make test ALL=1` does."""
    return os.environ.get("ASDM_ALL_TESTS", "0") not in ("", "0")


def spread(cases: int, wanted: int, number: int) -> list[int]:
    """Which cases a sweep keeps: of as many equal stretches as are wanted one each, from one to the next a place later.

    So no value of a parameter that changes fastest is met again and again. number: of the sweep in its file, each of
    which begins a place later: sweeps over one list that are enough meet all of it together.
    """
    if not wanted:
        return []
    edges = [k * cases // wanted for k in range(wanted + 1)]
    return [start + (k + number) % (end - start) for k, (start, end) in enumerate(zip(edges, edges[1:], strict=False))]


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "sweep(n): of its cases `make test` plays n, spread evenly, none for 0, and ALL=1 all"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """After -k and -m: of what they choose at least one case stays, but of sweep(0)."""
    if everything():
        return
    sweeps: dict[tuple, list] = {}
    for item in items:
        if item.get_closest_marker("sweep"):
            sweeps.setdefault((item.path, item.originalname), []).append(item)
    numbers: Counter = Counter()
    left_out = []
    for (path, name), cases in sweeps.items():
        wanted = min(cases[0].get_closest_marker("sweep").args[0], len(cases))
        kept = spread(len(cases), wanted, numbers[path])
        numbers[path] += 1
        if len(kept) < len(cases):
            LEFT_OUT[f"{path.name}::{name}"] = len(cases) - len(kept)
            left_out += [case for i, case in enumerate(cases) if i not in kept]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def pytest_sessionfinish(session):
    """From a worker of pytest-xdist to the process that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = LEFT_OUT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    LEFT_OUT.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter):
    if LEFT_OUT:
        cases, sweeps = sum(LEFT_OUT.values()), len(LEFT_OUT)
        terminalreporter.write_line(
            f"{cases} cases of {sweeps} sweeps were left out: make test ALL=1 runs them", bold=True
        )
