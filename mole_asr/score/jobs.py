"""Trainings of a recipe side by side: small models make poor use of more than one core, two of them do not."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from mole_asr.errors import MoleError


def do_all(work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int) -> None:
    """Calls a function with each of these arguments: in turn, or in so many processes, which share the threads.

    Args:
        work: of a module, not of another function.
        calls: arguments of each call, the longest calls first.
        jobs: processes at most; a single call, and all with one process, are made in this one.

    Raises:
        MoleError: a call raised it, or a process ended. Calls that are under way come to their end first, and no other
            begins.
    """
    jobs = min(jobs, len(calls))
    if jobs <= 1:
        for arguments in calls:
            work(*arguments)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of torch's threads
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        running: set[Future[Any]] = set()
        for arguments in calls:
            if len(running) == jobs:  # the pool itself would begin others although one has failed
                running = _some_are_done(running)
            running.add(pool.submit(work, *arguments))
        while running:
            running = _some_are_done(running)


def _some_are_done(running: set[Future[Any]]) -> set[Future[Any]]:
    """Waits for the first of some calls to end, and returns the others."""
    done, others = wait(running, return_when=FIRST_COMPLETED)
    try:
        for future in done:
            future.result()
    except BrokenProcessPool:
        raise MoleError("a process ended before its work; if memory ran out, give fewer --jobs") from None
    return others


def is_job() -> bool:
    """Whether this process is one of several side by side, whose progress bars would overwrite each other."""
    return multiprocessing.parent_process() is not None
