"""Times the sampling steps of one run through the host's progress messages."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from demo.server import Client, ServerError, outputs_of

# What Speed Up says of a run on its node.
MADE = re.compile(r"(\d+) of (\d+) evaluations of the network were made")
FINISHED = ("execution_success", "execution_error", "execution_interrupted")


@dataclass(frozen=True)
class TimedRun:
    """Outputs of a run, the seconds of every sampling step after the first, and the share of the network's evaluations
    that were made.

    The first step loads and moves weights, and its start is not announced. On a graphics card the
    host announces a step when its work is queued; the queue is as long at the end of a run as after
    its first step, so the average is right where a single value may not be.
    """

    outputs: Mapping
    step_seconds: tuple[float, ...]
    made: float = 1.0


def timed_run(url: str, graph: Mapping, sampler: str) -> TimedRun:
    """Run an API graph on the host at ``url`` and time the steps of its node ``sampler``."""
    # A client of its own: when a connection closes, the host forgets whoever has its client id,
    # be it the next run's.
    return asyncio.run(_timed_run(Client(url), graph, sampler))


async def _timed_run(client: Client, graph: Mapping, sampler: str) -> TimedRun:
    ends: dict[int, float] = {}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{client.url}/ws?clientId={client.id}") as socket,
    ):
        run = client.submit(graph)
        async for message in socket:
            now = time.perf_counter()
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            event = message.json()
            kind, data = event["type"], event["data"]
            if data.get("prompt_id") != run:
                continue
            if kind == "progress" and data["node"] == sampler:
                ends.setdefault(data["value"], now)
            elif kind in FINISHED:
                break
        else:
            raise ServerError("ComfyUI closed the connection in the middle of a run")
    while (record := client.history(run)) is None:  # written just after the message
        await asyncio.sleep(0.01)
    outputs = outputs_of(record)
    if len(ends) < 2:
        raise ServerError(f"ComfyUI reported {len(ends)} steps of node {sampler}; at least 2 are needed to time one")
    return TimedRun(outputs, step_seconds(ends), made(client.get(f"/asdm/notes?prompt_id={run}")))


def made(notes: Mapping[str, list[str]]) -> float:
    """Share of the network's evaluations that a run made, from what was said on its nodes; all where nothing was."""
    found = [match for texts in notes.values() for text in texts if (match := MADE.search(text))]
    return min((int(match[1]) / int(match[2]) for match in found), default=1.0)


def step_seconds(ends: Mapping[int, float]) -> tuple[float, ...]:
    """Seconds of every step after the first, from the times at which steps ended.

    The host announces at most ten steps a second, the first and the last one always. Steps between
    two announcements share their average.
    """
    known = sorted(ends)
    return tuple(
        (ends[last] - ends[first]) / (last - first)
        for first, last in zip(known, known[1:], strict=False)
        for _ in range(first, last)
    )
