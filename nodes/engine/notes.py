"""A way to speak from inside a run: on the node that a technique comes from, in the log, and over HTTP.

By then the node has executed, or was not executed at all because the host kept its result. So what is said goes to the
browser as an event of its own (web/notes.js shows it on the node until the next run), stays in the memory of the server
for pages that are opened later and for users of the HTTP interface (GET /asdm/notes), and goes into the log.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from aiohttp import web
from comfy_execution.utils import get_executing_context
from server import PromptServer

from .technique import Say

EVENT = "asdm.notes"
ROUTE = "/asdm/notes"
PROMPTS_KEPT = 100

_said: OrderedDict[str, dict[str, dict[str, str]]] = OrderedDict()  # prompt -> node -> sentence -> who executed


_silent: ContextVar[bool] = ContextVar("asdm_silent", default=False)


@contextmanager
def silence() -> Iterator[None]:
    """Nothing is said meanwhile, of runs that only get something ready."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def executing() -> str:
    """The id of the node that executes at the moment ("12", in a subgraph "7:12"); "" outside of the host's queue."""
    context = get_executing_context()
    return str(context.node_id) if context is not None else ""


def said(prompt_id: str | None = None) -> dict[str, list[str]]:
    """Node id -> what it said in a run of the queue; None: in the last one in which anything was said."""
    if prompt_id is None:
        prompt_id = next(reversed(_said), "")
    return {node: list(texts) for node, texts in _said.get(prompt_id, {}).items()}


def speaker(node_id: str = "") -> Say:
    """What a technique speaks with in one run: each sentence once in the log, and on its node; without a node of its
    own, on the one that executes.
    """
    heard: set[str] = set()

    def say(text: str, report: bool = False) -> None:
        if text in heard or _silent.get():
            return
        heard.add(text)
        logging.log(logging.INFO if report else logging.WARNING, f"asdm: {text}")
        context = get_executing_context()
        node = node_id or executing()
        if context is None or not node:
            return
        texts = _said.setdefault(str(context.prompt_id), {}).setdefault(node, {})
        while len(_said) > PROMPTS_KEPT:
            _said.popitem(last=False)
        if text in texts:  # several runs of one node, as in A/B Compare
            return
        texts[text] = executing()
        server = getattr(PromptServer, "instance", None)
        if server is not None:
            message = {"prompt_id": str(context.prompt_id), "node": node, "notes": list(texts)}
            server.send_sync(EVENT, message, server.client_id)

    return say


def register() -> None:
    """Answer GET /asdm/notes: node id -> sentences, of the last run in which anything was said; of a run with
    ?prompt_id=...; with ?workflow=..., its id, what holds of its results (see `standing`).

    Raises RuntimeError where another copy of the pack does so: the host would end over the second of two equal routes,
    and nodes of one copy would speak to the other.
    """
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    for route in server.routes:
        if isinstance(route, web.RouteDef) and route.path == ROUTE:
            raise RuntimeError(
                f"asdm is there twice, in {_folder(route.handler.__module__)} and in {_folder(__name__)}, and only the "
                "first is used. Remove one of the two folders from custom_nodes, and start ComfyUI again."
            )

    @server.routes.get(ROUTE)
    async def notes(request: web.Request) -> web.Response:
        workflow = request.query.get("workflow")
        if workflow is not None:
            return web.json_response(standing(server.prompt_queue, workflow))
        return web.json_response(said(request.query.get("prompt_id")))


def _folder(module: str) -> Path:
    """The folder of the copy of the pack that a module belongs to."""
    return Path(sys.modules[module].__file__ or "").parents[2]


def _workflow_of(extra: object) -> object:
    """The id of the workflow that a prompt came with; None where there is none. Clients may send anything there."""
    for key in ("extra_pnginfo", "workflow", "id"):
        extra = extra.get(key) if isinstance(extra, dict) else None
    return extra


def standing(queue, workflow: str) -> dict[str, list[str]]:
    """Node id -> what was said in the last run of a workflow in the host's queue, and in runs before it by nodes whose
    results were taken from the host's cache since.
    """
    found: dict[str, dict[str, str]] = {}
    with queue.mutex:
        for prompt, status in (
            *((record["prompt"], record.get("status")) for record in queue.history.values()),
            *((prompt, None) for prompt in queue.currently_running.values()),
        ):
            _, prompt_id, _, extra, *_ = prompt
            if _workflow_of(extra) != workflow:
                continue
            cached = {
                node
                for kind, data in (status or {}).get("messages", ())
                if kind == "execution_cached"
                for node in data["nodes"]
            }
            still = {id: {text: by for text, by in texts.items() if by in cached} for id, texts in found.items()}
            new = _said.get(str(prompt_id), {})
            found = {id: {**still.get(id, {}), **new.get(id, {})} for id in {**still, **new}}
    return {id: list(texts) for id, texts in found.items() if texts}
