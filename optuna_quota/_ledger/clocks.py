"""How far the clocks of machines are apart, as far as rows can prove it (pure).

Clocks are believed until rows prove them wrong. A worker that writes at ``t`` on its own clock
what it could only write after it had read the stamp ``s`` of another machine's clock proves that
its clock is ahead of the other by ``t - s`` at most. Where that is negative, the clocks
contradict each other, and the one behind is moved forward by the least that makes the order of
events possible. What is left of the error is the time from the stamp to its being read.
"""

from __future__ import annotations

from optuna_quota._ledger.reservation import Reservation


class Clocks:
    """What is known of the machines' clocks.

    Attributes:
        shifts: Seconds by which each machine's stamps are to be moved forward; what is not there
            is right as it is.
    """

    def __init__(self) -> None:
        self.shifts: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        # Seconds by which one machine's clock is ahead of another's, at most; negative ones only.
        self._ahead: dict[tuple[str, str], float] = {}

    def learn(self, reservation: Reservation) -> bool:
        """Take in a row; return whether any clock is now seen differently."""
        worker, beat = reservation.worker, reservation.beat
        if worker is None or beat is None:
            return False
        machine = worker.machine
        self._latest[machine] = max(beat, self._latest.get(machine, beat))
        news = False
        for other, stamp in reservation.after.items():
            ahead = beat - stamp
            if other != machine and ahead < self._ahead.get((machine, other), 0.0):
                self._ahead[machine, other] = ahead
                news = True
        return news and self._solve()

    def later_than(self, machine: str, now: float) -> dict[str, float]:
        """Return other machines' stamps that a machine's clock has yet to reach: proofs.

        Args:
            machine: The machine that is about to write.
            now: The time on its clock.
        """
        return {m: s for m, s in self._latest.items() if m != machine and s > now}

    def now(self, now: float) -> float:
        """Return the time of a reader, which is not before anything that it has read."""
        seen = (self.moved(machine, stamp) for machine, stamp in self._latest.items())
        return max(now, max(seen, default=now))

    def moved(self, machine: str, stamp: float) -> float:
        """Return a machine's stamp on the common clock."""
        return stamp + self.shifts.get(machine, 0.0)

    def _solve(self) -> bool:
        # Shortest paths from a source at distance 0 of every machine (Bellman and Ford): the
        # largest offsets, none above 0, that satisfy every difference that was proved.
        offsets: dict[str, float] = {m: 0.0 for pair in self._ahead for m in pair}
        for _ in offsets:
            for (machine, other), ahead in self._ahead.items():
                offsets[machine] = min(offsets[machine], offsets[other] + ahead)
        shifts = {machine: -offset for machine, offset in offsets.items() if offset < 0}
        changed = shifts != self.shifts
        self.shifts = shifts
        return changed
