"""Work for the next steps, done by a thread while this step is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """``get(step)`` is ``compute(step)``, of which one background thread has the next ``depth`` steps ready.

    Any step may be asked for, at the cost of waiting for it. What ``compute`` raises is raised by the ``get`` of that
    step. The thread ends with ``close``, and by itself when nobody holds this any more.
    """

    def __init__(self, compute: Callable[[int], T], depth: int = 3) -> None:
        self._compute = compute
        self._depth = depth
        self._pending: dict[int, Future[T]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def get(self, step: int) -> T:
        for stale in [other for other in self._pending if not step <= other <= step + self._depth]:
            self._pending.pop(stale).cancel()
        for following in range(step, step + self._depth + 1):
            if following not in self._pending:
                self._pending[following] = self._thread.submit(self._compute, following)
        return self._pending.pop(step).result()

    def close(self) -> None:
        self._pending.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)
