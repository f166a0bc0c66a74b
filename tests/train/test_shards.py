"""Shards as streams: which samples there are, who reads what, where a run goes on, and what is opened at all."""

import gzip
import http.server
import io
import json
import os
import pickle
import tarfile
import threading

import pytest

from tests.train.test_sources import greys, models, picture, recipe, write_shards  # noqa: F401
from train import shards
from train.ahead import Ahead
from train.data import Batches
from train.shards import Lanes, Place
from train.sources import open_source


@pytest.fixture()
def data(tmp_path):
    return write_shards(tmp_path / "data", 24, 3)  # 8 shards, in pairs of which one lane of four reads


@pytest.fixture()
def opens(monkeypatch):
    """The names of the shards that are opened, in turn."""
    seen = []
    original = shards.opened

    def recorded(url, pipes):
        seen.append(shards.label(url))
        return original(url, pipes)

    monkeypatch.setattr(shards, "opened", recorded)
    return seen


# The samples ----------------------------------------------------------------------------------------


def test_every_picture_comes_once_an_epoch_and_lanes_read_side_by_side(models, data, opens):  # noqa: F811
    source = open_source(recipe("shards", data, models, "data.lanes=4"))
    epochs = [greys(source, range(n, n + 24)) for n in (0, 24)]
    assert [sorted(e) for e in epochs] == [list(range(24))] * 2 and epochs[0] != epochs[1]
    assert len({i // 3 for i in epochs[0][:4]}) == 4  # four shards in the first four samples
    assert len(opens) == 1 + 16  # once for a look, then each once an epoch


def test_pictures_of_a_shard_are_shuffled_as_webdataset_does_it(tmp_path):
    from webdataset.filters import shuffle

    write_shards(tmp_path / "data", 200, 200)
    lanes = Lanes([str(tmp_path / "data" / "000.tar")], 1, 7)
    names = [lanes.row(n).name for n in range(200)]
    in_order = [row.name for row in shards.rows_of(lanes.urls[0])]
    assert sorted(names) == sorted(in_order) and names != in_order
    assert names != [lanes.row(n).name for n in range(200, 400)]
    seed = "7 0 0"  # of the run, the epoch and the shard, wherever that lies
    assert names == list(shuffle(shards.SHUFFLED, initial=shards.FIRST, seed=seed)(iter(in_order)))


def test_shards_of_different_lengths_fill_every_lane(tmp_path):
    write_shards(tmp_path / "data", 12, 5)  # 5, 5 and 2
    urls = sorted(map(str, (tmp_path / "data").glob("*.tar")))
    lanes = Lanes(urls, 16, 0)
    assert lanes.count == 3
    for lane in range(3):
        rows = [lanes.row(lane + 3 * c) for c in range(10)]
        epochs = [[row.name for row in rows if row.place.epoch == e] for e in range(rows[-1].place.epoch)]
        its = [sum(1 for _ in shards.rows_of(lanes.dealt(lane, e)[0])) for e in range(len(epochs))]
        assert [len(set(e)) for e in epochs] == its


# Who reads what -------------------------------------------------------------------------------------


def numbers(process, processes, worker, workers, micro_batch, batch=8, steps=6):
    """Those of one worker of one process, as loop and DataLoader deal them out."""
    parts = [
        range(first, first + micro_batch)
        for step in range(steps)
        for part in range(batch // micro_batch // processes)
        for first in [step * batch + (part * processes + process) * micro_batch]
    ]
    return [n for part in parts[worker::workers] for n in part]


@pytest.mark.parametrize(("processes", "workers", "micro_batch"), [(2, 2, 1), (1, 2, 2), (2, 1, 2), (4, 1, 1)])
def test_processes_and_workers_read_shards_of_their_own(
    processes,
    workers,
    micro_batch,
    models,  # noqa: F811
    data,
    opens,
):
    config = recipe("shards", data, models, "data.lanes=4")
    whole = greys(open_source(config), range(48))
    read = []
    for process in range(processes):
        for worker in range(workers):
            source = open_source(config)
            opens.clear()
            mine = numbers(process, processes, worker, workers, micro_batch)
            assert greys(source, mine) == [whole[n] for n in mine]
            read.append(set(opens[: len(opens) // 2]))  # of the first epoch
    assert sum(map(len, read)) == len(set().union(*read)) == 8


def test_more_readers_than_lanes_see_the_same_samples_and_say_what_it_costs(models, data, capsys):  # noqa: F811
    config = recipe("shards", data, models, "data.lanes=4", "run.batch=6", "run.micro_batch=1")
    whole = greys(open_source(config), range(48))
    mine = numbers(1, 3, 0, 1, 1, 6)
    capsys.readouterr()
    assert greys(open_source(config, processes=3), mine) == [whole[n] for n in mine]
    assert "is a multiple of 3 (run.micro_batch x processes x run.workers)" in capsys.readouterr().out


def test_workers_ahead_bring_the_samples_and_the_places(models, data):  # noqa: F811
    config = recipe("shards", data, models, "data.lanes=4", "run.micro_batch=2", "run.workers=2")

    def run(workers):
        source = open_source(config)
        ahead = Ahead(Batches(source, config), [range(n, n + 2) for n in range(0, 20, 2)], workers)
        parts = [ahead.next() for _ in range(6)]
        ahead.close()
        return [part.x0 for part in parts], source.state(12)

    (read, state), (again, its) = run(0), run(2)
    assert all((a == b).all() for a, b in zip(read, again, strict=True)) and state == its
    assert sorted(state["places"]) == ["0", "1", "2", "3"] and {p[0] for p in state["places"].values()} == {3}


# Going on -------------------------------------------------------------------------------------------


@pytest.mark.sweep(3)
@pytest.mark.parametrize("n", [0, 1, 5, 8, 11, 23, 24, 30])
def test_a_run_goes_on_where_it_was_from_the_states_of_all_processes(n, models, data, opens):  # noqa: F811
    config = recipe("shards", data, models, "data.lanes=4", "run.batch=2")
    whole = greys(open_source(config), range(60))
    sources = [open_source(config) for _ in range(2)]
    for i in range(n):
        greys(sources[i % 2], [i])
    state = json.loads(json.dumps(sources[0].together([source.state(n) for source in sources])))
    again = open_source(config)
    again.restore(state)
    opens.clear()
    assert greys(again, range(n, 60)) == whole[n:]
    # Of what lies behind, nothing is opened but the shards the lanes stand in.
    assert len(opens) <= -(-60 // 3) - n // 3 + 4


def test_other_shards_than_before_are_refused(models, data):  # noqa: F811
    config = recipe("shards", data, models)
    state = open_source(config).state(0)
    (data / "000.tar").unlink()
    with pytest.raises(ValueError, match="not the shards that the run began with"):
        open_source(config).restore(state)


def test_held_out_pictures_are_the_same_each_time(models, data):  # noqa: F811
    source = open_source(recipe("shards", data, models, "data.lanes=4"))
    assert greys(source, range(10)) == greys(source, range(10))


# What is opened -------------------------------------------------------------------------------------


def test_nothing_is_read_beforehand_but_the_first_pictures(models, data, opens, monkeypatch):  # noqa: F811
    reads = []
    original = shards.rows_of

    def counted(url, pipes=False):
        for row in original(url, pipes):
            reads.append(row.name)
            yield row

    monkeypatch.setattr(shards, "rows_of", counted)
    source = open_source(recipe("shards", data, models))
    assert opens == ["000.tar"] and len(reads) == 1
    assert source.text(2).states.shape[0] == 2


@pytest.fixture()
def server(data):
    """An http server of the shards; of `broken.tar` it sends half of what it promises."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(data))

        def do_GET(self):
            if self.path != "/broken.tar":
                return super().do_GET()
            whole = (data / "000.tar").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: len(whole) // 3])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def names(urls, pipes=False):
    return [row.name.rpartition("/")[2] for url in urls for row in shards.rows_of(url, pipes)]


def test_disk_http_s3_and_compressed_shards_are_one(data, server, tmp_path, monkeypatch):
    wanted = names(shards.urls_of(str(data / "00[03].tar"), False))
    assert wanted == ["00", "01", "02", "03", "04", "05"]
    assert names(shards.urls_of(f"{data}/00{{0,3}}.tar", False)) == wanted
    assert names(shards.urls_of(f"{server}/00{{0,3}}.tar", False)) == wanted
    assert names(shards.urls_of(f"{server}/000.tar::{server}/003.tar", False)) == wanted
    (tmp_path / "gz").mkdir()
    for name in ("000", "003"):
        (tmp_path / "gz" / f"{name}.tar.gz").write_bytes(gzip.compress((data / f"{name}.tar").read_bytes()))
    assert names(shards.urls_of(str(tmp_path / "gz"), False)) == wanted
    # In the place of Amazon's program, one that reads a folder.
    program = tmp_path / "bin" / "aws"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && exec cat "{data}/${{3#s3://bucket/}}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    assert names(shards.urls_of("s3://bucket/00{0,3}.tar", False)) == wanted
    with pytest.raises(OSError, match="exit 1"):
        names(["s3://bucket/none.tar"])


def test_a_run_over_http_sees_what_a_run_on_the_disk_sees(models, data, server):  # noqa: F811
    on_disk = sorted(greys(open_source(recipe("shards", data, models)), range(24)))
    address = f"{server}/0{{00,03,06,09,12,15,18,21}}.tar"
    assert sorted(greys(open_source(recipe("shards", address, models)), range(24))) == on_disk == list(range(24))


def test_commands_run_only_where_a_setting_says_so(models, data, tmp_path, monkeypatch):  # noqa: F811
    ran = tmp_path / "ran"
    command = f"pipe:touch {ran}; cat {data}/000.tar"
    for spelling in (command, command.replace("pipe:", "PIPE:"), f"{data}/000.tar::{command}"):
        if spelling.startswith("/"):
            spelling = f"file:{spelling}"
        with pytest.raises(ValueError, match="would run a command of this machine's shell; data.pipes = true allows"):
            open_source(recipe("shards", spelling, models))
    monkeypatch.setenv("GOPEN_REWRITE", f"http://host/={command} #")
    with pytest.raises(ValueError, match="would run a command"):
        names(["http://host/x.tar"])
    assert not ran.exists()
    monkeypatch.delenv("GOPEN_REWRITE")
    source = open_source(recipe("shards", command, models, "data.pipes=true"))
    assert sorted(greys(source, range(3))) == [0, 1, 2] and ran.exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_unpickled(models, tmp_path):  # noqa: F811
    went_off = tmp_path / "went off"
    bomb = pickle.dumps(Bomb(str(went_off)))
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as tar:
        for name, content in {
            "a.png": picture(3),
            "a.txt": b"red",
            **{f"a.{kind}": bomb for kind in ("pyd", "pickle", "pkl", "pth", "npy", "npz", "cbor", "mp", "ten")},
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert greys(open_source(recipe("shards", tmp_path / "data", models)), range(2)) == [3, 3]
    assert not went_off.exists()


# What is broken -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "gz", "http"])
def test_a_shard_that_breaks_off_gives_what_it_has_and_is_named(how, data, server, capsys):
    whole = (data / "003.tar").read_bytes()
    url = str(data / "000.tar")
    if how == "cut":
        (data / "000.tar").write_bytes((data / "000.tar").read_bytes()[:2600])
    elif how == "gz":
        (data / "000.tar").write_bytes(gzip.compress(os.urandom(200) + whole)[:300])
    else:
        url = f"{server}/broken.tar"
    lanes = Lanes([url, str(data / "003.tar")], 1, 0)
    epoch = [row for row in (lanes.row(n) for n in range(20)) if row.place.epoch == 0]
    found = {row.name for row in epoch}
    assert {f"003.tar:a/0{i}" for i in (3, 4, 5)} <= found and 3 <= len(found) < 6
    assert f"left out {shards.label(url)} after {len(found) - 3} pictures: it cannot be read" in capsys.readouterr().out


def test_a_lane_with_nothing_left_ends_the_run(data):
    lanes = Lanes(sorted(map(str, data.glob("*.tar"))), 2, 0)
    assert lanes.row(0)
    for path in data.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="none of .*tar, .* gives a picture with a caption any more"):
        for n in range(0, 100, 2):
            lanes.row(n)


def test_what_reads_an_address_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="s3://b/0.tar is read with the program aws, which is not here: pip install"):
        shards.urls_of("s3://b/{0..3}.tar", False)
    with pytest.raises(ValueError, match="redis: is none of"):
        shards.urls_of("redis://b/0.tar", False)


def test_paths_of_windows_are_no_addresses():
    assert shards.scheme_of(r"C:\data\0.tar") == "" and shards.scheme_of("https://host/0.tar") == "https"
    assert Place(*json.loads(json.dumps(Place(1, 2, 3)))) == Place(1, 2, 3)
