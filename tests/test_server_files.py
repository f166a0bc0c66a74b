"""What demo/server.py does with files, without a host."""

import sys
import types
from pathlib import Path

import pytest
import yaml

from demo import serve, server


def test_link_shows_the_folder_and_can_be_made_again(tmp_path):
    target = tmp_path / "pack"
    target.mkdir()
    (target / "file").write_text("x")
    link = tmp_path / "base" / "custom_nodes" / "asdm"
    for _ in range(2):
        server.link_folder(link, target)
        assert (link / "file").read_text() == "x"
    other = tmp_path / "other"
    other.mkdir()
    server.link_folder(link, other)
    assert link.samefile(other) and (target / "file").exists()


def test_dead_link_is_replaced(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    server.link_folder(link, tmp_path)
    assert link.samefile(tmp_path)


def test_real_folder_in_the_place_of_the_link_is_not_deleted(tmp_path):
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "work").write_text("")
    with pytest.raises(OSError):
        server.link_folder(tmp_path / "link", tmp_path)
    assert (tmp_path / "link" / "work").exists()


def test_windows_gets_a_junction(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(server, "WINDOWS", True)
    monkeypatch.setitem(sys.modules, "_winapi", types.SimpleNamespace(CreateJunction=lambda *paths: made.append(paths)))
    server.link_folder(tmp_path / "link", tmp_path / "target")
    assert made == [(str(tmp_path / "target"), str(tmp_path / "link"))]


def test_model_paths_are_what_the_host_reads(tmp_path):
    folders = {
        "checkpoints": [Path("/a b/c: d"), Path("C:\\models\\x")],
        "loras": [Path('/quote"d'), Path("/é 日 🎨")],
    }
    file = tmp_path / "paths.yaml"
    server.write_model_paths(file, folders)
    read = yaml.safe_load(file.read_text("utf-8"))["asdm"]
    assert {kind: paths.split("\n") for kind, paths in read.items()} == {
        kind: [str(path) for path in paths] for kind, paths in folders.items()
    }


def test_model_folders_of_a_host(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "note.txt").write_text("")
    assert server.model_folders(tmp_path) == {"checkpoints": [tmp_path / "checkpoints"]}
    assert server.model_folders(tmp_path / "none") == {}


def test_port_in_use_is_avoided():
    with server.socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert server.free_port(taken.getsockname()[1]) != taken.getsockname()[1]
    with server.socket.socket() as everywhere:
        everywhere.bind(("", 0))
        everywhere.listen()
        assert server.free_port(everywhere.getsockname()[1]) != everywhere.getsockname()[1]
    for port in (-1, 2**16):
        with pytest.raises(server.ServerError, match="a port is a number from 0 to 65535"):
            server.free_port(port)


@pytest.mark.skipif(server.WINDOWS, reason="closing connections hold no port on Windows")
def test_a_port_is_free_again_after_a_server_that_closed_first():
    with server.socket.socket() as listening:
        listening.setsockopt(server.socket.SOL_SOCKET, server.socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        visitor = server.socket.create_connection(("127.0.0.1", port))
        accepted, _ = listening.accept()
        accepted.close()  # as on Ctrl-C with a tab of the browser open
    visitor.close()
    assert server.free_port(port) == port


def test_pictures_of_workflows_are_offered_and_nothing_is_overwritten(tmp_path):
    wanted = {path.name for path in serve.PICTURES.glob("*.png")}
    assert wanted
    mine = tmp_path / sorted(wanted)[0]
    mine.write_bytes(b"mine")
    serve.offer_pictures(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == wanted and mine.read_bytes() == b"mine"


def test_without_a_display_the_page_is_left_to_the_person(monkeypatch):
    opened = []
    monkeypatch.setattr(serve.webbrowser, "open", lambda url: opened.append(url) or True)
    monkeypatch.setattr(serve, "WINDOWS", False)
    monkeypatch.setattr(serve.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    assert serve.open_page("http://here") == "this machine has no display" and not opened
    monkeypatch.setenv("DISPLAY", ":0")
    assert serve.open_page("http://here") == "" and opened == ["http://here"]
    monkeypatch.setattr(serve.webbrowser, "open", lambda url: False)
    assert serve.open_page("http://here") == "no browser was found"
