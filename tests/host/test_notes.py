"""What techniques say in a run, on their nodes: to the browser, and to users of the HTTP interface."""

import asyncio
import json

import aiohttp
import pytest

from demo.server import Client

FEW = "feature inheritance does nothing in a run of 3 steps"


def graph(steps, preset="fast", cfg=3.0):
    """Feature Inheritance is node 5, and says so where steps are too few."""
    sampling = {"positive": ["2", 0], "negative": ["2", 0], "latent_image": ["4", 0], "seed": 1, "steps": steps}
    sampling |= {"cfg": cfg, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "model": ["5", 0]}
    inheriting = {"model": ["1", 0], "preset": preset, "memory_limit_mb": 0, "keep_on_cpu": False}
    return {
        "1": {"class_type": "ASDMCheckpointLoader", "inputs": {"ckpt_name": "emoji-teacher.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "panda on white, noto style"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "5": {"class_type": "ASDMFeatureInheritance", "inputs": inheriting},
        "6": {"class_type": "KSampler", "inputs": sampling},
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
    }


def renamed(nodes, names):
    """A graph whose nodes have other ids."""
    new = {
        names.get(id, id): node | {"inputs": {k: [names.get(v[0], v[0]), v[1]] if isinstance(v, list) else v
                                              for k, v in node["inputs"].items()}}
        for id, node in nodes.items()
    }  # fmt: skip
    return new


async def events(client, nodes):
    """Our events of a run."""
    found = []
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{client.url}/ws?clientId={client.id}") as socket,
    ):
        run = client.submit(nodes)
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                continue
            event = message.json()
            if event["type"] == "asdm.notes":
                found.append(event["data"])
            elif event["type"] in ("execution_success", "execution_error") and event["data"].get("prompt_id") == run:
                assert event["type"] == "execution_success", event["data"]
                return run, found
    raise AssertionError("the host closed the connection")


def test_a_run_speaks_on_the_node_that_placed_the_technique(server):
    client = Client(server.url)
    run, found = asyncio.run(events(client, graph(3)))
    assert [(e["prompt_id"], e["node"], len(e["notes"])) for e in found] == [(run, "5", 1)]
    assert FEW in found[0]["notes"][0]
    assert client.get(f"/asdm/notes?prompt_id={run}") == {"5": found[0]["notes"]}
    assert client.get("/asdm/notes") == {"5": found[0]["notes"]}
    # Node 5 comes from the host's cache now: it says the same of a new run, and nothing where nothing is to be said.
    run, found = asyncio.run(events(client, graph(3, cfg=2.0)))
    assert [e["node"] for e in found] == ["5"] and FEW in found[0]["notes"][0]
    run, found = asyncio.run(events(client, graph(8)))
    assert not found and client.get(f"/asdm/notes?prompt_id={run}") == {}


@pytest.mark.parametrize("other", ["15", "12:5"])
def test_the_same_graph_under_other_ids_speaks_under_these(server, other):
    client = Client(server.url)
    asyncio.run(events(client, graph(3, cfg=1.5)))
    _, found = asyncio.run(events(client, renamed(graph(3, cfg=1.5), {"5": other, "6": "16"})))
    assert [e["node"] for e in found] == [other]


def test_the_embedded_family_says_on_its_loader_that_a_size_is_not_its_own(server):
    client = Client(server.url)
    nodes = graph(8, preset="balanced")
    nodes["4"]["inputs"]["width"] = 192
    run, found = asyncio.run(events(client, nodes))
    assert [e["node"] for e in found] == ["1"] and "paints 128 x 128 pixels" in found[0]["notes"][0]
    assert "at 192 x 128" in found[0]["notes"][0]


def test_pages_that_are_opened_later_ask_for_the_last_run_of_their_workflow(server):
    client = Client(server.url)

    def notes(workflow):
        return client.get(f"/asdm/notes?workflow={workflow}")

    def run(workflow, nodes):
        client.wait(client.submit(nodes, {"id": workflow, "nodes": []}))

    run("mine", graph(3, cfg=1.25))
    run("another", graph(8, cfg=1.25))
    run("mine", graph(3, cfg=1.25))  # all of it from the host's cache: the picture stands, and what was said of it
    assert FEW in notes("mine")["5"][0]
    for extra in ({"extra_pnginfo": None}, {"extra_pnginfo": {"workflow": "mine"}}, {"extra_pnginfo": []}):
        body = {"prompt": graph(3, cfg=1.25), "client_id": client.id, "extra_data": extra}  # another client's
        client.wait(json.loads(client.request("/prompt", body))["prompt_id"])
    assert FEW in notes("mine")["5"][0]
    assert notes("another") == notes("unknown") == {}
    run("mine", graph(8, cfg=1.25, preset="balanced"))
    assert notes("mine") == {}


def test_what_a_comparison_gets_ready_with_is_not_told(server):
    """A/B Compare evaluates the network once before each run; only the runs are told of."""
    client = Client(server.url)
    nodes = graph(8)
    nodes["5"] = {"class_type": "ASDMSpeedUp", "inputs": {"model": ["1", 0], "likeness": "close"}}
    nodes["6"]["class_type"] = "ASDMABCompare"
    nodes["6"]["inputs"] |= {"vae": ["1", 2], "rounds": 2, "label_a": "", "label_b": ""}
    nodes = {key: nodes[key] for key in "123456" if key in nodes}
    _, found = asyncio.run(events(client, nodes))
    told = {text for event in found for text in event["notes"]}
    assert [e["node"] for e in found] == ["5"] * len(found)
    assert len([text for text in told if "evaluations of the network" in text]) == 1
