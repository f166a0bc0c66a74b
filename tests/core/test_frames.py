"""Calls within `with_room` need no new memory, however deep it is called."""

import pytest

from asdm_core.frames import with_room

DEPTHS, CALLS = 200, 500  # so many calls deep more than a chunk of frames is filled


def leaf(a, b, c, d, e, f, g, h):
    return a + h


def work(resource, *, last):
    """Page faults while a small function is called often."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        leaf(1, 2, 3, 4, 5, 6, 7, last)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def at_depth(n, call):
    return call() if n == 0 else at_depth(n - 1, call)


def test_calls_within_need_no_new_frames_at_any_depth():
    resource = pytest.importorskip("resource", reason="Windows counts no page faults of a process so")
    found = [at_depth(n, lambda: with_room(work, resource, last=8)) for n in range(DEPTHS)]
    assert max(found) < CALLS / 2  # without room one of them, with CPython 3.11, has a fault for each call


def test_what_is_called_gets_its_arguments_and_gives_its_result():
    assert with_room(divmod, 7, 2) == (3, 1)
    assert with_room(dict, [("a", 1)], b=2) == {"a": 1, "b": 2}
    with pytest.raises(KeyError):
        with_room({}.__getitem__, 1)
