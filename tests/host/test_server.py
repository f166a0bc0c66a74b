"""The real ComfyUI starts with the pack, and the client talks to it."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image

from demo.server import PACK, Client, PromptError, PromptInterrupted, Server, ServerError, free_port, link_folder

RED = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 1, "color": 0xFF0000}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "red"}},
}


def test_graph_runs_and_the_image_carries_it(client):
    outputs = client.run(RED)
    image = Image.open(io.BytesIO(client.fetch(outputs["2"]["images"][0])))
    assert image.size == (32, 16)
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert json.loads(image.text["prompt"]) == RED


def test_refused_graph_names_node_and_problem(client):
    graph = json.loads(json.dumps(RED))
    graph["1"]["inputs"]["width"] = -5
    with pytest.raises(PromptError, match=r"node 1 \(EmptyImage\).*width"):
        client.run(graph)
    graph["1"]["class_type"] = "NoSuchNode"
    with pytest.raises(PromptError, match="NoSuchNode"):
        client.run(graph)


def test_failing_node_is_named(client):
    name = client.upload("broken.png", b"this is no image")
    graph = {
        "7": {"class_type": "LoadImage", "inputs": {"image": name}},
        "8": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
    }
    with pytest.raises(PromptError, match="LoadImage"):
        client.run(graph)


def test_uploaded_image_can_be_loaded(client):
    png = io.BytesIO()
    Image.new("RGB", (8, 8), "blue").save(png, "PNG")
    name = client.upload("blue.png", png.getvalue())
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blue"}},
    }
    image = Image.open(io.BytesIO(client.fetch(client.run(graph)["2"]["images"][0])))
    assert image.getpixel((0, 0)) == (0, 0, 255)


def test_choices_of_both_node_interfaces(client):
    assert "euler" in client.choices("KSampler", "sampler_name")
    with pytest.raises(KeyError):
        client.object_info("NoSuchNode")


def test_pack_is_loaded_from_the_link(server):
    assert (server.base / "custom_nodes" / "asdm").samefile(PACK)
    log = server.log(10_000)
    assert "IMPORT FAILED" not in log
    assert "Error while calling comfy_entrypoint" not in log


def test_a_second_copy_of_the_pack_says_so_and_the_host_starts(host, tmp_path):
    for name in ("asdm", "ComfyUI-asdm"):
        link_folder(tmp_path / "custom_nodes" / name, PACK)
    both = ["--whitelist-custom-nodes", "asdm", "ComfyUI-asdm"]
    with Server(host, tmp_path, flags=["--cpu", "--disable-api-nodes", *both], pack=None) as server:
        said = [line for line in server.log().splitlines() if "asdm is there twice, in" in line]
        assert said and all("Remove one of the two folders" in line for line in said)
        assert "ASDMSpeedUp" in Client(server.url).object_info()


def test_stop_leaves_no_process_and_can_be_repeated(host, tmp_path):
    server = Server(host, tmp_path, flags=["--cpu"])
    with pytest.raises(ZeroDivisionError), server:
        pid = server._process.pid
        raise ZeroDivisionError
    server.stop()
    assert not server.alive
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{server.url}/system_stats", timeout=2)
    if os.name != "nt":
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_server_ends_when_its_starter_is_killed(host, tmp_path):
    code = (
        "import sys, time; from demo.server import Server\n"
        "with Server(sys.argv[1], sys.argv[2], flags=['--cpu']) as s: print(s.url, flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code, host, tmp_path], cwd=PACK, stdout=subprocess.PIPE, text=True
    )
    url = starter.stdout.readline().strip()
    Client(url).get("/system_stats")
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    for _ in range(3000):
        try:
            urllib.request.urlopen(f"{url}/system_stats", timeout=2)
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its starter")


def test_host_that_cannot_start_shows_its_log(host, tmp_path):
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-flag"):
        Server(host, tmp_path, flags=["--no-such-flag"]).start()


def test_script_in_host(run_in_host, host):
    found = run_in_host("environment.py", "main", 1, two=[2])
    assert found["args"] == [1] and found["kwargs"] == {"two": [2]}
    assert found["device"] == "cpu" and found["pytorch_attention"]
    assert found["nodes_file"] == str(host / "nodes.py")
    assert not found["pack_on_path"]


def test_script_failure_in_host_fails_the_test(run_in_host):
    with pytest.raises(pytest.fail.Exception, match="on purpose"):
        run_in_host("environment.py", "fail")


def test_interrupt(client):
    graph = {"0": {"class_type": "EmptyImage", "inputs": {"width": 2048, "height": 2048, "batch_size": 1, "color": 0}}}
    for i in range(1, 100):
        inputs = {
            "image": [str(i - 1), 0],
            "upscale_method": "lanczos",
            "width": 2048 + i % 2,
            "height": 2048,
            "crop": "disabled",
        }
        graph[str(i)] = {"class_type": "ImageScale", "inputs": inputs}
    graph["100"] = {"class_type": "PreviewImage", "inputs": {"images": ["99", 0]}}
    run = client.submit(graph)
    # ComfyUI forgets an interruption between a prompt's leaving the queue and its start, so ask until it has ended.
    deadline = time.monotonic() + 600
    while not client.get(f"/history/{run}"):
        assert time.monotonic() < deadline, "the prompt does not end"
        client.interrupt()
        time.sleep(0.1)
    with pytest.raises(PromptInterrupted):
        client.wait(run, timeout=600)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and terminals")
def test_serve_keeps_its_port_opens_the_browser_and_ends_in_order(tmp_path, host):
    """Under make in a terminal, twice in a row on one port, with a browser that stays connected."""
    import fcntl
    import termios

    def in_a_terminal():
        # Listens to Ctrl-C also where these tests were started in the background.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    page = tmp_path / "page"
    port = free_port()
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >> "{page}"\n')
    browser.chmod(0o755)
    (tmp_path / "Makefile").write_text(
        f"serve:\n\t@cd '{PACK}'; exec '{sys.executable}' -m demo.serve --port={port} --folder='{tmp_path / 'host'}'\n"
    )
    env = {**os.environ, "BROWSER": f"{browser} %s", "COMFYUI_PATH": str(host)}
    urls = []
    for _ in range(2):
        leader, follower = os.openpty()
        make = subprocess.Popen(
            ["make", "serve"], cwd=tmp_path, env=env, stdin=follower, stdout=follower, stderr=follower,
            preexec_fn=in_a_terminal,
        )  # fmt: skip
        os.close(follower)
        said = b""
        while b"Ctrl-C stops it" not in said:
            said += os.read(leader, 1000)
        url = re.search(rb"asdm is at http://127.0.0.1:(\d+)", said)
        urls.append(url[1])
        visitor = socket.create_connection(("127.0.0.1", int(url[1])))
        os.write(leader, b"\x03")
        make.wait(600)
        with contextlib.suppress(OSError):  # a terminal that nobody has open any more
            while more := os.read(leader, 1000):
                said += more
        visitor.close()
        os.close(leader)
        assert b"serve: stopped" in said and b"Traceback" not in said and b"***" not in said
    assert urls == [str(port).encode()] * 2
    assert page.read_text().split() == [f"http://127.0.0.1:{port}"] * 2
