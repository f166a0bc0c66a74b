"""Room for the frames of Python's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SLOTS = 4096  # of 8 bytes: twice a chunk of frames, so that as much again comes with it


def with_room(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call something that calls much. Frames of up to 32 KB within it need no new memory.

    CPython keeps frames in chunks of 16 KB. A call that goes over the end of one maps the next, and unmaps it when it
    returns: where that end lies among the innermost calls of a network, it happens hundreds of times a forward, by
    chance of how deep the network is called, and costs milliseconds. The frame of this function asks for more than a
    chunk, so it begins one of its own, and what it calls lies in the rest of that.
    """
    return call(*args, **kwargs)


with_room.__code__ = with_room.__code__.replace(co_stacksize=SLOTS)
