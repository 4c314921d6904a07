"""What several benchmarks share: workers that start together, and storages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import multiprocessing
from pathlib import Path
import sys
import tempfile
from typing import Any, TypeVar


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.storages import Address, missing, storage_at


_T = TypeVar("_T")


def run_workers(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    count: int,
    timeout: float,
    started: Callable[[], _T],
) -> _T:
    """Run processes that share nothing but a barrier, their last argument; wait until they end.

    Args:
        work: What each runs; it waits at the barrier until all are ready.
        arguments: Its other arguments.
        count: The number of processes.
        timeout: Seconds within which they must end.
        started: Called as they start; its result is returned.
    """
    context = multiprocessing.get_context("forkserver")
    together = context.Barrier(count + 1)
    processes = [context.Process(target=work, args=(*arguments, together)) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        together.wait(timeout=300)
        found = started()
        for process in processes:
            process.join(timeout=timeout)
            if process.exitcode != 0:
                raise RuntimeError(f"A worker ended with {process.exitcode}.")
        return found
    finally:
        for process in processes:
            process.kill()
            process.join()


def storages(kinds: Sequence[str]) -> Iterator[Address]:
    """Yield a new storage of each kind that is available here, and print why others aren't."""
    for kind in kinds:
        reason = missing(kind)
        if reason is not None:
            print(f"{kind:14} skipped: {reason}")
            continue
        with tempfile.TemporaryDirectory() as folder, storage_at(kind, Path(folder)) as address:
            yield address
