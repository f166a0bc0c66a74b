"""The real ComfyUI-Manager beside the pack, installed as the registry installs it: the published zip and a list of its
files.

The Manager runs without a network; what the registry would tell it about the pack lies in its cache.
"""

import io
import json
import time
import zipfile

import pytest

from demo.server import Client, Server
from tools import registry

PROJECT = registry.tomllib.loads((registry.ROOT / "pyproject.toml").read_text("utf-8"))
VERSION = PROJECT["project"]["version"]
DISPLAY_NAME = PROJECT["tool"]["comfy"]["DisplayName"]
LIST = "https://api.comfy.org/nodes"


def cache_name(address):
    """The Manager's name for a page in its cache (manager_util.get_cache_path)."""
    number = 0
    for letter in address:
        number = (number * 31 + ord(letter)) % 2**32
    return f"{number}_{address.rpartition('/')[2]}.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A ComfyUI folder in which the Manager has installed the pack from the registry."""
    base = tmp_path_factory.mktemp("managed")
    registry.write_zip(archive := io.BytesIO())
    with zipfile.ZipFile(archive) as published:
        published.extractall(base / "custom_nodes" / "asdm")
        (base / "custom_nodes" / "asdm" / ".tracking").write_text("\n".join(published.namelist()))
    manager = base / "user" / "__manager"
    (manager / "cache").mkdir(parents=True)
    (manager / "config.ini").write_text("[default]\nnetwork_mode = offline\n")
    entry = {
        "id": "asdm",
        "name": DISPLAY_NAME,
        "description": "",
        "publisher": {"name": "asdm"},
        "latest_version": {"version": VERSION},
    }
    (manager / "cache" / cache_name(LIST)).write_text(json.dumps({"nodes": [entry]}))
    return base


@pytest.fixture
def start(host, base):
    """start(): a ComfyUI with the Manager in that folder, as a context manager."""
    return lambda: Server(host, base, flags=["--cpu", "--disable-api-nodes", "--enable-manager"], pack=None)


def ours(client):
    return [name for name, info in client.object_info().items() if info["python_module"].startswith("custom_nodes.")]


def manage(client, kind, **params):
    """Have the Manager do one thing, as its page does."""
    client.request("/v2/manager/queue/task", {"ui_id": kind, "client_id": client.id, "kind": kind, "params": params})
    client.request("/v2/manager/queue/start", {})
    for _ in range(6000):
        done = client.get("/v2/manager/queue/history?ui_id=" + kind)["history"]
        if done:
            return done
        time.sleep(0.1)
    pytest.fail(f"the Manager did not finish: {kind}")


def test_manager_recognises_disables_and_enables_the_pack(start, base):
    with start() as server:
        client = Client(server.url)
        assert client.request("/v2/manager/version").startswith(b"V4")
        installed = client.get("/v2/customnode/installed")
        assert installed == {"asdm": {"ver": VERSION, "cnr_id": "asdm", "aux_id": None, "enabled": True}}
        assert json.loads(client.request("/v2/customnode/import_fail_info_bulk", {"cnr_ids": ["asdm"]})) == {
            "asdm": None
        }
        assert sorted(ours(client)) == sorted(registry.node_ids())
        graph = json.loads((registry.ROOT / "workflows/api/text_to_image_pack.json").read_text("utf-8"))
        next(node for node in graph.values() if node["class_type"] == "KSampler")["inputs"]["steps"] = 2
        assert any(output.get("images") for output in client.run(graph).values())
        manage(client, "disable", node_name="asdm", is_unknown=False)
        (entry,) = client.get("/v2/customnode/installed").values()
        assert (entry["cnr_id"], entry["ver"], entry["enabled"]) == ("asdm", VERSION, False)
        log = server.log(10_000)
        assert "IMPORT FAILED" not in log and "invalid nodes notice" not in log
    with start() as server:
        client = Client(server.url)
        assert ours(client) == []
        client.request("/v2/customnode/import_fail_info_bulk", {"cnr_ids": ["asdm"]})  # reads the registry's list
        manage(client, "enable", cnr_id="asdm")
        assert client.get("/v2/customnode/installed")["asdm"]["enabled"]
    with start() as server:
        assert sorted(ours(Client(server.url))) == sorted(registry.node_ids())
