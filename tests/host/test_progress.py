"""One progress bar over all that a node samples, as the browser is told of it."""

import asyncio

import aiohttp
import pytest

from demo.server import Client

STEPS, ROUNDS = 4, 2
SAMPLING = {
    "positive": ["2", 0],
    "negative": ["2", 0],
    "latent_image": ["4", 0],
    "seed": 1,
    "steps": STEPS,
    "cfg": 1.0,
    "sampler_name": "euler",
    "scheduler": "normal",
}
# Node: its inputs, and the sampling runs it makes.
NODES = {
    "ASDMABCompare": (
        {"model": ["5", 0], "vae": ["1", 2], "denoise": 1.0, "rounds": ROUNDS, "label_a": "", "label_b": ""},
        2 * (1 + ROUNDS),
    ),
    "ASDMXYPlot": (
        {
            "model": ["1", 0],
            "vae": ["1", 2],
            "denoise": 1.0,
            "rounds": ROUNDS,
            "x": "inheritance",
            "x.values": "off, fast",
            "y": "nothing",
        },
        2 * (1 + ROUNDS),  # off is the reference itself
    ),
    "ASDMCalibrate": (
        {
            "model": ["1", 0],
            "denoise": 1.0,
            "pictures": 2,
            "name": "told",
            "likeness": "close",
            "try_fewer_steps": True,
        },
        2 * (1 + 2),  # in full, and in 3 and 2 of 4 steps
    ),
}


def graph(node):
    inheriting = {"model": ["1", 0], "preset": "fast", "memory_limit_mb": 0, "keep_on_cpu": False}
    return {
        "1": {"class_type": "ASDMCheckpointLoader", "inputs": {"ckpt_name": "emoji-teacher.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "panda on white, noto style"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "5": {"class_type": "ASDMFeatureInheritance", "inputs": inheriting},
        "6": {"class_type": node, "inputs": SAMPLING | NODES[node][0]},
    }


async def told(client, graph, node):
    """What the host says of a node during a run: (value, max) of its bar, and its words."""
    bar, words = [], []
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{client.url}/ws?clientId={client.id}") as socket,
    ):
        run = client.submit(graph)
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                kind, length = (int.from_bytes(message.data[i : i + 4], "big") for i in (0, 4))
                if kind == 3 and message.data[8 : 8 + length] == node.encode():
                    words.append(message.data[8 + length :].decode())
                continue
            event = message.json()
            kind, data = event["type"], event["data"]
            if kind == "progress" and data["node"] == node:
                bar.append((data["value"], data["max"]))
            elif kind.startswith("execution_") and data.get("prompt_id") == run:
                if kind == "execution_success":
                    return bar, words
                assert kind not in ("execution_error", "execution_interrupted"), data
    raise AssertionError("the connection ended in the middle of a run")


@pytest.mark.sweep(1)
@pytest.mark.parametrize("node", NODES)
def test_one_bar_over_all_inner_runs(server, node):
    bar, words = asyncio.run(told(Client(server.url), graph(node), "6"))
    total = STEPS * NODES[node][1]
    values = [value for value, _ in bar]
    assert {most for _, most in bar} == {total} and values == sorted(values) and values[-1] == total
    assert len(set(values)) >= NODES[node][1]  # every run moves it
    assert words[-1].startswith("took ")
