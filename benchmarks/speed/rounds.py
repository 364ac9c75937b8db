"""The measurement itself: candidates take turns, round after round, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.speed.candidates import Candidate
from benchmarks.speed.statistics import Visit
from benchmarks.speed.workers import WorkerError, Workers

_QUICK = 1.0
"""Where a batch takes less, each visit begins with a call that does not count: caches were others' meanwhile."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    batches   batch sizes of the sweep
    rounds    how often every candidate is visited at every size
    seconds   how long a visit lasts at least, after `calls` calls
    longest   batches expected to take more seconds than this are left out
    longest_build   seconds after which building a candidate is given up; None: never
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    rounds: int = 5
    seconds: float = 1.0
    calls: int = 3
    longest: float = 20.0
    longest_build: float | None = None


@dataclass
class Measured:
    """All visits; by candidate and batch size the very first call, why it was left out, and how it failed.

    rounds   how many rounds are complete
    """

    visits: list[Visit] = field(default_factory=list)
    rounds: int = 0
    first_calls: dict[tuple[str, int], float] = field(default_factory=dict)
    left_out: dict[tuple[str, int], str] = field(default_factory=dict)
    failed: dict[tuple[str, int], str] = field(default_factory=dict)

    def of(self, candidate: str, batch: int) -> list[Visit]:
        """Return the visits to a candidate at one batch size."""
        return [one for one in self.visits if (one.candidate, one.batch) == (candidate, batch)]

    def expected(self, candidate: str, batch: int) -> float | None:
        """Return the seconds that a batch should take, by the nearest smaller size; None where nothing is known."""
        known = [one for one in self.visits if one.candidate == candidate and one.batch <= batch]
        if not known:
            return None
        nearest = max(known, key=lambda one: (one.batch, one.round))
        return batch / nearest.rate


def measure(
    plan: Plan,
    candidates: Sequence[Candidate],
    workers: Workers,
    say: Callable[[str], None] = lambda step: None,
    keep: Callable[[Measured], None] = lambda measured: None,
) -> Measured:
    """Visit every candidate at every batch size in every round, beginning with another one each time.

    `keep` receives what was measured so far after every batch size of every round: a run that is ended early loses one
    size at most. A failure ends a candidate at that batch size.
    """
    measured = Measured()
    for number in range(plan.rounds):
        start = number % max(1, len(candidates))
        turn = [*candidates[start:], *candidates[:start]]
        for batch in plan.batches:
            say(f"round {number + 1} of {plan.rounds}, batch {batch}")
            for candidate in turn:
                _visit(plan, candidate, batch, number, workers, measured, say)
            measured.rounds = number + (batch == plan.batches[-1])  # a round is complete with its last size
            keep(measured)
    return measured


def _visit(
    plan: Plan,
    candidate: Candidate,
    batch: int,
    number: int,
    workers: Workers,
    measured: Measured,
    say: Callable[[str], None],
) -> None:
    key = candidate.name, batch
    gemm = candidate.model == "gemm"
    if key in measured.failed or key in measured.left_out or (gemm and batch != workers.batch):
        return  # products are made for one size
    expected = measured.expected(*key)
    if expected is not None and expected > plan.longest and not gemm and not measured.of(*key):
        measured.left_out[key] = f"a batch would take about {expected:.0f} s"
        return
    try:
        worker = workers.of(candidate)
        settle = not workers.settled(candidate, batch) or (expected is not None and expected < _QUICK)
        answer = worker.ask("time", batch=batch, seconds=plan.seconds, calls=plan.calls, settle=settle)
        workers.note_memory(candidate)
    except WorkerError as error:
        measured.failed[key] = f"failed in round {number + 1}: {error}"
        workers.end(candidate.name)
        say(f"{candidate.name}, batch {batch}: {error}")
        return
    measured.first_calls.setdefault(key, answer["first"])
    measured.visits.append(Visit(candidate.name, batch, number, tuple(answer["seconds"])))
