"""The count that a consumer keeps, and that the flood reads to pace itself.

Why a shared page and not a reply: the consumer is what we measure, so pacing may cost it next to
nothing. A hit is one addition and one test (about 0.06 µs, the same for every contestant); every
``STEP`` hits the count goes to eight bytes of a memory-mapped file, where the flood looks.

Pacing, once for all: at most ``WINDOW`` messages are under way, published but not yet counted by
the consumer. That is at most 4 MB, so no output buffer limit (32 MB) kills anybody, and it is under
the 10,000 messages of a default eventbus queue, so no bounded queue drops.
"""

import asyncio
import cProfile
import mmap
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

WINDOW = 8_000
STEP = 256
STALL = 5.0  # seconds without progress after which a run is over, and incomplete
PACING = (
    f"at most {WINDOW:,} messages (under 4 MB) published and not yet counted by the consumer, "
    f"which shows its count every {STEP}; "
    "server and publisher share a core, the contestant has the others"
)

_COUNT = struct.Struct("=Q")


def cpu_seconds() -> float:
    """CPU of this process, all its threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Run the block under cProfile and leave the profile there; nothing without a path."""
    if path is None:
        yield
        return
    profile = cProfile.Profile()
    with profile:
        yield
    profile.dump_stats(path)


def queued_seconds() -> float:
    """How long the main thread wanted a core and got none (Linux tells; elsewhere 0)."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def spent() -> tuple[float, float, float]:
    """Clock, CPU, and time without a core; take two and subtract."""
    return perf_counter(), cpu_seconds(), queued_seconds()


def costs(begin: tuple[float, ...], end: tuple[float, ...], messages: int) -> dict[str, float]:
    """What ``messages`` cost between two looks.

    ``busy`` is CPU per second of the clock, ``queued`` the share of it without a core: where both
    together are well under 1, the contestant waited for somebody else.
    """
    wall, cpu, queued = (b - a for a, b in zip(begin, end, strict=True))
    return {
        "per_second": messages / wall,
        "cpu_us": cpu / messages * 1e6,
        "busy": cpu / wall,
        "queued": queued / wall,
        "seconds": wall,
    }


class Board:
    """Eight bytes that two processes share."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _COUNT.size)

    @staticmethod
    def create(path: Path) -> None:
        path.write_bytes(bytes(_COUNT.size))

    def read(self) -> int:
        count: int = _COUNT.unpack_from(self._page)[0]
        return count

    def write(self, count: int) -> None:
        _COUNT.pack_into(self._page, 0, count)


class Meter:
    """Counts messages; takes time and CPU between ``warm`` and ``total``."""

    def __init__(self, board: Board, *, total: int, warm: int) -> None:
        if total % STEP or warm % STEP or warm >= total:
            raise ValueError(f"total and warm are multiples of {STEP}, and warm < total")
        self.count = 0
        self._board = board
        self._total = total
        self._warm = warm
        self._done = asyncio.Event()
        self._begin = self._end = (0.0, 0.0, 0.0)

    def hit(self) -> None:
        """One message reached the handler."""
        self.count = count = self.count + 1
        if not count % STEP:
            self._show(count)

    def _show(self, count: int) -> None:
        self._board.write(count)
        if count == self._warm:
            self._begin = spent()
        elif count == self._total:
            self._end = spent()
            self._done.set()

    async def finished(self) -> None:
        """Return when all arrived, or when nothing came for ``STALL`` seconds."""
        seen = -1
        while not self._done.is_set() and seen != self.count:
            seen = self.count
            try:
                await asyncio.wait_for(self._done.wait(), STALL)
            except TimeoutError:
                continue
        await asyncio.sleep(0.1)  # a copy too many would come now

    def result(self) -> dict[str, float]:
        """What was measured; without a rate when not everything arrived."""
        found: dict[str, float] = {
            "messages": self._total,
            "received": self.count,
            "complete": self.count == self._total,
        }
        if self._done.is_set():
            found |= costs(self._begin, self._end, self._total - self._warm)
        return found
