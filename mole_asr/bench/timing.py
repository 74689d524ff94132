"""Time of several functions, measured in turn so that a busy machine slows all of them alike."""

import gc
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

_CACHE_BYTES = 256 << 20  # larger than the cache of any GPU
_MALLOC_BYTES = 24 << 20


@dataclass(frozen=True)
class Timing:
    """Of all calls that count.

    Attributes:
        milliseconds: the median.
        low: the lower quartile.
        high: the upper quartile.
        faulted_megabytes: memory that the system had to map anew, page by page, in the median call; None on a GPU.
    """

    milliseconds: float
    low: float
    high: float
    faulted_megabytes: float | None


def time_in_turn(functions: Mapping[str, Callable[[], object]], repeat: int, device: torch.device) -> dict[str, Timing]:
    """Each function `repeat` times, round by round, after one round that does not count.

    On a CPU it is the time that this one thread was computing; what other processes do hardly counts. On a GPU it is
    the time between two events, with a cold cache.
    """
    measure = _gpu_milliseconds if device.type == "cuda" else _cpu_milliseconds
    calls: dict[str, list[tuple[float, float | None]]] = {name: [] for name in functions}
    for round_number in range(repeat + 1):
        for name, function in functions.items():
            faults = None if device.type == "cuda" else _faulted_megabytes()
            milliseconds = measure(function)
            if round_number > 0:
                calls[name].append((milliseconds, None if faults is None else _faulted_megabytes() - faults))
    return {name: _summary(found) for name, found in calls.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, no garbage collection, and an allocator as in a process that has computed for a while.

    The C library keeps blocks below 32 MB for the next use only after some of that size were freed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.ones(_MALLOC_BYTES, dtype=torch.uint8)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class GpuCost:
    """What one call costs a GPU beside time: kernels launched, waits of the host, bytes of memory at the peak."""

    launches: int
    syncs: int
    peak_bytes: int


def gpu_cost(function: Callable[[], object]) -> GpuCost:
    """Counts for one call; it has been called before."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    syncs = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    peak = torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    launches = sum(event.count for event in profiler.key_averages() if "LaunchKernel" in event.key)
    return GpuCost(launches, syncs, peak)


@dataclass(frozen=True)
class Ceilings:
    """The best that a GPU was measured to do: floating point operations and bytes a second."""

    flops: float
    bytes: float

    def roofline_ms(self, flops: float, moved: float) -> float:
        """The least time for so many operations and so much memory traffic."""
        return 1e3 * max(flops / self.flops, moved / self.bytes)


@cache
def measure_ceilings(dtype: torch.dtype, device: torch.device) -> Ceilings:
    """A large square product, and a copy of a large block."""
    size = 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    block = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    times = time_in_turn({"product": lambda: a @ b, "copy": lambda: target.copy_(block)}, 10, device)
    return Ceilings(
        2 * size**3 / (1e-3 * times["product"].milliseconds), 2 * block.numel() / (1e-3 * times["copy"].milliseconds)
    )


def _cpu_milliseconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return 1e3 * (time.thread_time() - start)


def _gpu_milliseconds(function: Callable[[], object]) -> float:
    torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _faulted_megabytes() -> float:
    """Memory that this process has had mapped since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize() / 1e6


def _summary(calls: list[tuple[float, float | None]]) -> Timing:
    times = [milliseconds for milliseconds, _ in calls]
    faulted = [megabytes for _, megabytes in calls if megabytes is not None]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Timing(median, low, high, statistics.median(faulted) if faulted else None)
