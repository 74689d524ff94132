"""Trainings of a recipe side by side: small models make poor use of more than one core, two of them do not."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from mole_asr.errors import MoleError


def do_all(work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int) -> None:
    """Calls a function with each of these arguments: in turn, or in so many processes, which share the cores evenly.

    Args:
        work: of a module, not of another function.
        calls: arguments of each call, the longest calls first.
        jobs: processes; with one all is done in this one.

    Raises:
        MoleError: a call raised it, or a process was killed. Calls that are under way come to their end first, others
            do not begin.
    """
    if jobs == 1:
        for arguments in calls:
            work(*arguments)
        return
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of torch's threads
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        futures = [pool.submit(work, *arguments) for arguments in calls]
        try:
            for future in futures:
                future.result()
        except BrokenProcessPool:
            raise MoleError(
                f"one of {jobs} processes was killed; was there too little memory? Give fewer --jobs"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def is_job() -> bool:
    """Whether this process is one of several side by side, whose progress bars would overwrite each other."""
    return multiprocessing.parent_process() is not None
