"""How fast a save goes: a tenth of the time while training goes on, all of it once somebody waits.

A thread with a low priority still takes from training, where all cores compute: the ranks of a step
wait for the slowest one. So the thread works on one piece and rests nine times as long. The longer
a piece took, the longer the rest: it is long where cores or the disk are busy, and short where they
are not.
"""

import threading
import time

RESTS = 9.0  # times as long as the work before: a tenth of the time is work
LONGEST = 1.0  # seconds of one rest: a disk that stalls is no reason to stall


class Pace:
    """The rests of one save. Any thread may end them."""

    def __init__(self) -> None:
        self._waited_for = threading.Event()
        self._since = time.monotonic()  # the end of the last rest

    @property
    def is_waited_for(self) -> bool:
        return self._waited_for.is_set()

    def hurry(self) -> None:
        """Somebody waits for the save: end its rest, and rest no more."""
        self._waited_for.set()

    def rest(self) -> None:
        """Rest, for the work since the last rest."""
        worked = time.monotonic() - self._since
        self._waited_for.wait(min(RESTS * worked, LONGEST))
        self._since = time.monotonic()
