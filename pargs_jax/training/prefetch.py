"""Makes batches before the steps that need them."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(AbstractContextManager, Generic[Item]):
    """Yields `make(number)` for each number, in order. A thread makes items up to `ahead` before they are needed.

    An exception in `make` is raised where its item would have been yielded.

    Attributes:
        waited: total seconds that the reader has waited for items.
    """

    def __init__(self, make: Callable[[int], Item], numbers: range, ahead: int = 2) -> None:
        self.waited = 0.0
        self._make = make
        self._numbers = iter(numbers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._made: deque[Future[Item]] = deque()
        self._ask_for(ahead)

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if not self._made:
            raise StopIteration
        started = time.perf_counter()
        item = self._made.popleft().result()
        self.waited += time.perf_counter() - started
        self._ask_for(1)
        return item

    def _ask_for(self, count: int) -> None:
        self._made.extend(self._thread.submit(self._make, number) for number in islice(self._numbers, count))
