"""Webdataset shards as streams: tars on a disk, http and S3, plain or compressed, opened and taken apart by webdataset.

Nothing is indexed. Each epoch the shards are shuffled and dealt out to lanes. A lane reads its shards one after the
other and shuffles pictures within each; where it stands is three numbers. Sample n of a run comes from lane n % lanes,
so processes and workers that take other samples read other shards, and what a sample is depends on none of them.

Of a tar only pictures, text and JSON are looked at, and nothing is unpickled: webdataset's decoders are not used.
"""

from __future__ import annotations

import glob
import json
import lzma
import os
import random
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlparse

import torch

from .captions import SUFFIXES, decode, texts_of
from .seeds import seeded

SHUFFLED = 250  # pictures of a lane that are shuffled together
FIRST = 50  # of them, before the first is given
KINDS = tuple(suffix[1:] for suffix in SUFFIXES)
CAPTIONS = ("txt", "caption", "json")
ENDINGS = ("*.tar", "*.tar.gz", "*.tgz", "*.tar.xz", "*.tar.bz2")
# What a shard raises that cannot be read, or not to its end. A picture in it is judged later.
BROKEN = (OSError, ValueError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)
# The programs webdataset reads with.
PROGRAMS = {
    **dict.fromkeys(("http", "https", "sftp", "ftps", "scp", "hf"), ("curl", "install curl")),
    "s3": ("aws", "pip install awscli"),
    "gs": ("gsutil", "install Google's gsutil"),
    "ais": ("ais", "install AIStore's ais"),
}
CHUNK = 1 << 16


class Place(NamedTuple):
    """Where a lane stands: the epoch, the shard among the lane's own of it, how many of its pictures were taken."""

    epoch: int = 0
    shard: int = 0
    taken: int = 0


class Row(NamedTuple):
    """A picture as it lies in a shard. text: its caption, written as a text or as JSON. without: pictures without a
    caption before it. place: of what comes after it.
    """

    name: str
    picture: bytes
    text: bytes
    is_json: bool
    without: int = 0
    place: Place = Place()

    @property
    def captions(self) -> list[str]:
        """Raises ValueError where there is none, or it cannot be decoded."""
        text = decode(self.text, self.name)
        found = json.loads(text) if self.is_json else text
        if isinstance(found, dict):
            found = found.get("caption") or found.get("text") or ""
        return texts_of(found, self.name)


# What there is --------------------------------------------------------------------------------------


def scheme_of(url: str) -> str:
    """The kind of an address; nothing for a path, drives of Windows included."""
    found = urlparse(url).scheme
    return found if len(found) > 1 else ""


def urls_of(path: str, pipes: bool) -> list[str]:
    """The shards that data.path names: a file, a folder, a pattern, or addresses with {000..127}, several with ::
    between.

    pipes: whether it may name commands (pipe:). Raises ValueError.
    """
    webdataset()
    import braceexpand
    from webdataset.shardlists import expand_urls

    if not scheme_of(path):
        parts = [path] if "{" not in path else braceexpand.braceexpand(path, escape=os.name != "nt")
        patterns = [str(Path(p) / end) for p in parts for end in ENDINGS] if Path(path).is_dir() else list(parts)
        found = sorted({name for pattern in patterns for name in glob.glob(pattern)})
        if not found:
            raise ValueError(
                f"data.path: {path} names no .tar file; wanted a file, a folder, a pattern such as data/*.tar, or "
                "addresses such as https://host/{000..127}.tar"
            )
        return found
    try:
        urls = expand_urls(path)
    except (AssertionError, ValueError) as e:  # ${NAME} that is not set; braces that do not end
        raise ValueError(f"data.path: {path}: {e}") from None
    for url in urls:
        allowed(url, pipes)
        program, remedy = PROGRAMS.get(scheme_of(url), ("", ""))
        if program and not shutil.which(program):
            raise ValueError(f"data.path: {url} is read with the program {program}, which is not here: {remedy}")
    return urls


def allowed(url: str, pipes: bool) -> None:
    """Raise ValueError for an address that is not opened."""
    from webdataset.gopen import gopen_schemes

    scheme = scheme_of(url)
    if scheme == "pipe" and not pipes:
        raise ValueError(
            f"data.path: {url:.100} would run a command of this machine's shell; data.pipes = true allows it"
        )
    if scheme not in ("", "file", "s3", *gopen_schemes):
        raise ValueError(f"data.path: {url:.100}: {scheme}: is none of {', '.join(sorted({*PROGRAMS, 'file'}))}")


def webdataset() -> Any:
    """The library. Raises ValueError where it is not installed."""
    try:
        import webdataset
    except ModuleNotFoundError:
        raise ValueError('data.source = "shards" needs the webdataset library: pip install webdataset') from None
    return webdataset


# One shard ------------------------------------------------------------------------------------------


def opened(url: str, pipes: bool) -> BinaryIO:
    """A shard from its first byte."""
    from webdataset.gopen import Pipe, gopen, rewrite_url

    if not scheme_of(url):
        return open(url, "rb")
    url = rewrite_url(url)  # as GOPEN_REWRITE of the environment says
    allowed(url, pipes)
    if scheme_of(url) == "s3":  # which webdataset leaves to pipe:
        return Pipe(["aws", "s3", "cp", url, "-"], mode="rb", bufsize=CHUNK)
    return gopen(url)


def _looked_at(name: str) -> bool:
    from webdataset.tariterators import base_plus_ext

    kind = base_plus_ext(name)[1]
    return kind is not None and kind.lower() in (*KINDS, *CAPTIONS)


def rows_of(url: str, pipes: bool = False) -> Iterator[Row]:
    """The pictures with captions of a shard, in their order. Raises one of BROKEN where it cannot be read to its end.

    Members that stand together and share their name up to the first dot are one sample (webdataset).
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    stream = opened(url, pipes)
    try:
        without = 0
        for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}], select_files=_looked_at)):
            picture = next((sample[kind] for kind in KINDS if kind in sample), None)
            written = next((kind for kind in CAPTIONS if kind in sample), None)
            if picture is None:
                continue
            if written is None:
                without += 1
                continue
            yield Row(f"{label(url)}:{sample['__key__']}", picture, sample[written], written == "json", without)
            without = 0
        while stream.read(CHUNK):  # what a tar is filled up with
            pass
    except tarfile.TarError:
        if not stream.read(1):  # where the program that reads has failed, it says more than a tar without an end
            stream.close()
        raise
    else:
        stream.close()  # raises where that program failed
    finally:
        with suppress(OSError):  # of one that is stopped on the way
            stream.close()


def label(url: str) -> str:
    return url if scheme_of(url) == "pipe" else url.rpartition("/")[2].rpartition(os.sep)[2]


def why(error: BaseException) -> str:
    """The first line of an error, without what webdataset appends to its arguments."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0] if error.args else error
    return (str(said).split(" @ <")[0].splitlines() or [type(error).__name__])[0][:200]


def readable(url: str, pipes: bool) -> Iterator[Row]:
    """`rows_of` as far as a shard can be read; where it breaks off, that is said."""
    read = 0
    try:
        for row in rows_of(url, pipes):
            read += 1
            yield row
    except BROKEN as e:
        print(f"left out {label(url)} after {read} pictures: it cannot be read as a tar ({why(e)})", flush=True)


# All of them ----------------------------------------------------------------------------------------


class Lanes:
    """The shards of data.path, dealt out to `count` lanes, or as many as there are shards.

    A reader goes forward alone: `row` of what lies behind it begins at the lane's first picture again.
    """

    def __init__(self, urls: Sequence[str], count: int, seed: int, pipes: bool = False):
        self.urls = list(urls)
        self.count = min(count, len(self.urls))
        self.seed = seed
        self.pipes = pipes
        self.starts: dict[int, tuple[int, Place]] = {}
        self.readers: dict[int, Reader] = {}

    def __getstate__(self) -> dict:
        return {**vars(self), "readers": {}}

    def first(self, count: int) -> list[Row]:
        """The first pictures in the order of the shards. Raises ValueError where there are none."""
        found = list(islice((row for url in self.urls for row in readable(url, self.pipes)), count))
        if not found:
            raise ValueError(
                f"data.path: {label(self.urls[0])}{' and the others hold' if self.urls[1:] else ' holds'} no pictures "
                "with captions; wanted NAME.jpg with NAME.txt or NAME.json beside it"
            )
        return found

    def dealt(self, lane: int, epoch: int) -> list[str]:
        """The shards of a lane in an epoch, in its order."""
        order = torch.randperm(len(self.urls), generator=seeded(self.seed, 16, epoch)).tolist()
        return [self.urls[i] for i in order[lane :: self.count]]

    def row(self, n: int) -> Row:
        """Sample n of the run."""
        c, lane = divmod(n, self.count)
        reader = self.readers.get(lane)
        if reader is None or c < reader.first:
            at, place = self.starts.get(lane, (0, Place()))
            if c < at:
                at, place = 0, Place()
            reader = self.readers[lane] = Reader(self, lane, at, place)
        return reader.row(c)

    def forget(self, n: int) -> None:
        """Drop what the lane of sample n holds of samples before it."""
        c, lane = divmod(n, self.count)
        self.readers[lane].forget(c)

    def shuffled(self, url: str, epoch: int) -> Iterator[Row]:
        """The pictures of a shard, shuffled as webdataset does it, the same each time and wherever the shard lies."""
        from webdataset.filters import _shuffle

        rng = random.Random(f"{self.seed} {epoch} {self.urls.index(url)}")
        yield from _shuffle(readable(url, self.pipes), SHUFFLED, FIRST, rng=rng)

    def stream(self, lane: int, place: Place) -> Iterator[Row]:
        """The pictures of a lane from a place on, epoch after epoch. Raises ValueError where an epoch has none."""
        epoch, first, taken = place
        while True:
            found = bool(first or taken)
            urls = self.dealt(lane, epoch)
            for shard in range(first, len(urls)):
                for at, row in enumerate(islice(self.shuffled(urls[shard], epoch), taken, None), taken + 1):
                    found = True
                    yield row._replace(place=Place(epoch, shard, at))
                taken = 0
            if not found:
                raise ValueError(
                    f"data.path: none of {', '.join(map(label, urls[:3]))}{' ...' if urls[3:] else ''} gives a picture "
                    "with a caption any more; is the disk, or the network, still there? The same command goes on"
                )
            epoch, first = epoch + 1, 0


class Reader:
    """One lane, read forward. at: the picture that comes next, by its number in the lane; first: the first one held."""

    def __init__(self, lanes: Lanes, lane: int, at: int, place: Place):
        self.stream = lanes.stream(lane, place)
        self.first = self.at = at
        self.held: dict[int, Row] = {}

    def row(self, c: int) -> Row:
        while self.at <= c:
            self.held[self.at] = next(self.stream)
            self.at += 1
        return self.held[c]

    def forget(self, c: int) -> None:
        for old in range(self.first, min(c, self.at)):
            del self.held[old]
        self.first = max(self.first, min(c, self.at))
