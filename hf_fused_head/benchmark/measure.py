"""Clocks and memory meters, one step at a time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# A GPU runs a contender this long before it is timed, and as long again while it is.
SETTLE_MS = 200
# And rests this long before. An H100 that has drawn 780 W, above its 700 W, for 0.7 s lowers its
# clock from 1500 to 1100 MHz for at least another 0.25 s, whatever it computes: every step then
# takes a fifth longer, and without a rest chance says whose turn it is.
REST_MS = 300


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(step: Callable[[], object], device: torch.device, steps: int = 1) -> float:
    """Milliseconds that one step takes: CUDA events on a GPU, the wall clock on a CPU.

    On a GPU it is the mean of the second half of `2 * steps` in a row: while one runs the host
    prepares the next, as it does in training behind the layers before the head. What the host does
    after it has waited for the device still counts.

    Args:
        step: What is timed.
        device: Where it computes.
        steps: On a GPU, how many are timed; as many run before them. See `steps_to_settle`.
    """
    synchronize(device)
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3
    with torch.cuda.device(device):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        for _ in range(steps):
            step()
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / steps


def host_ms(step: Callable[[], object], device: torch.device, steps: int = 5) -> float | None:
    """Milliseconds until the host has issued one step to an idle GPU; None on a CPU.

    The fastest of several: whatever else the host does only adds. A step that waits for the device
    in between counts the wait.

    Args:
        step: What is timed.
        device: Where it computes.
        steps: How often.
    """
    if device.type != "cuda":
        return None
    issued = []
    for _ in range(steps):
        synchronize(device)
        begin = time.perf_counter()
        step()
        issued.append((time.perf_counter() - begin) * 1e3)
    synchronize(device)
    return min(issued)


def steps_to_settle(step: Callable[[], object], device: torch.device) -> int:
    """How many steps bring a device to the clock at which it runs these steps for long.

    An H100 lowers its clock by a quarter within 50 ms when products draw more than its power, and
    raises it behind elementwise work: a step timed alone takes up to 17 % longer or shorter with
    what ran before it.
    """
    return 1 if device.type != "cuda" else max(1, round(SETTLE_MS / time_ms(step, device)))


def rest(device: torch.device) -> None:
    """Lets a GPU idle for `REST_MS`, so that no turn pays for the power of the one before."""
    if device.type == "cuda":
        synchronize(device)
        time.sleep(REST_MS / 1e3)


def peak_of(step: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """The result of a step, and the most bytes it held at once beyond what existed before.

    Both meters count what torch's allocator allocates, so outputs and gradients are included and
    inputs are not. On a CPU the allocator reports every allocation to the profiler, temporaries
    inside of operators too, which a `TorchDispatchMode` cannot see; the resident size of the
    process would add what the allocator keeps for later.
    """
    synchronize(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = step()
    # The stubs of torch 2.13 do not know these members of the profiler's result.
    events: Any = profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    return result, peak


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills what `torch.empty` returns with NaN, so that nothing passes that was never written."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Not in the stubs of torch 2.13.
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        # Peers and cuBLAS warn about operations that have no deterministic version.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
