"""Data read by worker processes: the same as without them, and errors that stay one line."""

import os
import pickle
import signal

import pytest
import torch

from tests.train.recipes import NARROW
from tests.train.test_sources import models, recipe, write_folder  # noqa: F401
from train.ahead import Ahead
from train.recipe import load
from train.data import Batches, Random
from train.sources import open_source

PARTS = [range(n, n + 2) for n in range(0, 20, 2)]


def test_workers_read_what_is_read_without_them(models, tmp_path):  # noqa: F811
    config = recipe("folder", write_folder(tmp_path / "data"), models)
    batches = Batches(open_source(config), config)
    one, two = Ahead(batches, PARTS, 0), Ahead(batches, PARTS, 2)
    for numbers in PARTS:
        wanted, mine, its = batches(numbers), one.next(), two.next()
        for a, b, c in zip(wanted, mine, its, strict=True):
            assert a is b is c is None or torch.equal(a, b) and torch.equal(a, c)
    two.close()


def test_what_goes_to_a_worker_can_be_sent_there(models, tmp_path):  # noqa: F811
    """Where processes are started anew (Windows, macOS) the reader is pickled, without its networks."""
    config = recipe("folder", write_folder(tmp_path / "data"), models)
    batches = Batches(open_source(config), config)
    sent = pickle.dumps(batches)
    loaded, wanted = pickle.loads(sent).load(range(4)), batches.load(range(4))
    assert torch.equal(loaded.read.pictures, wanted.read.pictures) and loaded.read.tokens == wanted.read.tokens
    assert len(sent) < sum(4 * p.numel() for p in batches.source.to_text.networks[0].parameters())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_worker_is_its_own_line(models, tmp_path, workers):  # noqa: F811
    config = recipe("folder", write_folder(tmp_path / "data", broken=range(12)), models)
    ahead = Ahead(Batches(open_source(config), config), PARTS, workers)
    with pytest.raises(ValueError, match=r"^data.path: none of 100 pictures in a row could be read"):
        ahead.next()


def test_a_worker_that_dies_is_named():
    config = load(NARROW)

    class Dies(Random):
        def read(self, numbers, draws, flips=()):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OSError, match=r"a process that reads the data has died .*run.workers=0 does without"):
        Ahead(Batches(Dies(config), config), PARTS, 1).next()


def test_the_time_that_is_waited_is_counted():
    config = load(NARROW)
    now = [0.0]

    class Slow(Random):
        def read(self, numbers, draws, flips=()):
            now[0] += 3
            return super().read(numbers, draws, flips)

        def encode(self, read):
            now[0] += 5  # work of this process, no waiting
            return read

    ahead = Ahead(Batches(Slow(config), config), PARTS, 0, lambda: now[0])
    ahead.next(), ahead.next()
    assert ahead.waited == 6
