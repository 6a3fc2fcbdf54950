"""Work on every core of a CPU at once, each on one thread of its own.

torch splits every operation over all cores and waits for the slowest at its end. Where the work falls into independent
parts, a part per core has no such barriers: it is faster on a quiet machine, and does not collapse on a busy one.
"""

import ctypes
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from functa.models.compute.compilation import compiled

Result = TypeVar("Result")

Part = TypeVar("Part")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

MMAP_BYTES, TRIM_BYTES = 32 << 20, 1 << 30  # the first is the largest that glibc takes

_pools: dict[int, ThreadPoolExecutor] = {}

_lock = threading.Lock()


class Cores:
    """Run a function over many parts of a batch, on every core of a CPU where the function is compiled.

    Only what is compiled is worth a core of its own: eager operations hold the interpreter between them.
    """

    def __init__(self, compile_functions: bool, device: torch.device) -> None:
        self.compile_functions, self.device = compile_functions, device
        self.count = torch.get_num_threads() if compile_functions and device.type == "cpu" else 1
        self._built: set[Hashable] = set()

    def run(
        self,
        function: Callable[..., Tensor],
        parts: Sequence[Part],
        arguments: Callable[[int, Part], tuple[Any, ...]],
        shape: Hashable,
    ) -> Tensor:
        """Return the function's values of all parts, joined in order; with gradients on each is differentiated.

        `arguments` are the function's, for a core and a part; parts of another `shape` need another compiled graph.
        Core i takes parts i, i + n, ...: which core takes a part, and the order in which it adds gradients up, is
        fixed, and so are all results.
        """
        cores = min(self.count, len(parts))
        call = compiled(function, self.device.type, cores > 1) if self.compile_functions else function
        values: dict[int, Tensor] = {}

        def work(core: int) -> None:
            for number in range(core, len(parts), cores):
                value = call(*arguments(core, parts[number]))
                if torch.is_grad_enabled():
                    value.sum().backward()
                # A CUDA graph's next run writes to where its last output is.
                values[number] = value.detach().clone() if value.is_cuda else value.detach()

        if cores == 1:
            keep_memory()
            work(0)
        else:
            self._side_by_side(
                [partial(work, core) for core in range(cores)], (function, torch.is_grad_enabled(), shape)
            )
        return torch.cat([values[number] for number in range(len(parts))])

    def _side_by_side(self, works: Sequence[Callable[[], None]], graph: Hashable) -> None:
        if graph in self._built:
            side_by_side(works)
            return
        for work in works:  # one after the other: two threads would compile the same graph twice
            side_by_side([work], len(works))
        self._built.add(graph)


def side_by_side(parts: Sequence[Callable[[], Result]], threads: int | None = None) -> list[Result]:
    """Runs every part in a thread that keeps to one core; their results in order. As many threads as parts, or more.

    Gradients are recorded as in the calling thread. Raises what the first failing part raised.
    """
    recording = torch.is_grad_enabled()

    def run(part: Callable[[], Result]) -> Result:
        with torch.set_grad_enabled(recording):
            return part()

    return list(_pool(threads or len(parts)).map(run, parts))


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            keep_memory()
            every = torch.get_num_threads()
            gate = threading.Barrier(threads)

            def keep_to_one_core() -> None:
                torch.set_num_threads(1)
                gate.wait()  # all of them exist once one part has run

            _pools[threads] = ThreadPoolExecutor(threads, "functa-core", keep_to_one_core)
            list(_pools[threads].map(lambda _: None, range(threads)))
            torch.set_num_threads(every)  # a thread's own setting, but also what later threads start from
        return _pools[threads]


@cache
def keep_memory() -> None:
    """Asks glibc to keep what was freed, lest every chunk pay for page faults (a third of the time was seen).

    Only a main thread's heap learns this by itself, and in a Dask worker not even that: Dask sets the environment
    variable that makes malloc forget. Other C libraries know no mallopt, and are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)


SMALL_STEP = 2e9  # FLOPs: less than a tenth of a second of one core


def fit_threads(flops: float, device: torch.device) -> None:
    """One thread for the rest of this process where a step of so many FLOPs is small, on a CPU.

    Its operations are too short to be shared: two threads gain little on idle cores, and beside any other work they
    spend nearly all of the time waiting for each other, since every operation ends in a barrier that needs both to be
    running.
    """
    if device.type == "cpu" and flops < SMALL_STEP:
        torch.set_num_threads(1)
