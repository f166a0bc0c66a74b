"""What demo/server.py does with files, without a host."""

import sys
import types
from pathlib import Path

import pytest
import yaml

from demo import server


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
    folders = {"checkpoints": [Path("/a b/c: d"), Path("C:\\models\\x")], "loras": [Path('/quote"d')]}
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
    for port in (-1, 2**16):
        with pytest.raises(server.ServerError, match="a port is a number from 0 to 65535"):
            server.free_port(port)
