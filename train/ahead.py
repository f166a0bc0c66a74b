"""Data ahead of the card: worker processes decode pictures, tokenise captions and read caches (torch's DataLoader).

What a sample is depends on its number alone (train/data.py), so workers change nothing but the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from .data import Batch, Batches

PREFETCHED = 4  # parts that lie ready for each worker


class _Parts(Dataset):
    """Parts of batches by the numbers of their samples. An error is a value: a worker would wrap it into pages."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, numbers: range) -> Any:
        try:
            return self.batches.load(numbers)
        except (ValueError, OSError) as e:
            return e


class Ahead:
    """The parts of a run one after the other, `workers` processes ahead of it; 0 reads each when it is asked for.

    numbers: those of each part's samples. waited: seconds in which there was nothing ready.
    """

    def __init__(
        self,
        batches: Batches,
        numbers: Iterable[range],
        workers: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.batches = batches
        self.clock = clock
        self.waited = 0.0
        workers = workers if batches.source.ahead else 0
        self.loader: DataLoader = DataLoader(
            _Parts(batches),
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
        )
        self.parts: Iterator[Any] | None = None

    def next(self) -> Batch:
        """The next part, encoded. Raises what reading it raised, and OSError where a worker has died."""
        began = self.clock()
        if self.parts is None:
            self.parts = iter(self.loader)
        try:
            part = next(self.parts)
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            raise OSError(
                f"a process that reads the data has died ({str(e).splitlines()[0]}); run.workers=0 does without"
            ) from None
        self.waited += self.clock() - began
        if isinstance(part, Exception):
            raise part
        return self.batches.finish(part)

    def close(self) -> None:
        """End the workers."""
        self.parts = None
