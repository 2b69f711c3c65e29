"""How a comparison is made: contenders take turns, the order changes with every round, medians are compared.

On a shared and noisy machine only what was measured a moment apart can be compared; a figure alone says little.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from hostler.model.errors import HostlerError

Sample = Mapping[str, float]
"""What one round of one contender measured: name of the metric to milliseconds (or what the name says)."""

ROUNDS = 7
BASE = "qemu"


@dataclass(frozen=True, slots=True)
class Contender:
    """`optional`: a round that fails ends its part, not the benchmark."""

    name: str
    run: Callable[[], Awaitable[Sample]]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of one contender; `ratio` to the base's median, None for the base or without one."""

    metric: str
    contender: str
    median: float
    low: float
    high: float
    rounds: int
    ratio: float | None


@dataclass(slots=True)
class Result:
    """A finished benchmark. `base` is the contender ratios are taken against; `skipped` says who did not take part,
    and why."""

    name: str
    base: str = BASE
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """Metric by metric, contenders in the order they were given."""
        metrics = list(dict.fromkeys(metric for rounds in self.samples.values() for one in rounds for metric in one))
        return [row for metric in metrics for row in self._rows_of(metric)]

    def _rows_of(self, metric: str) -> list[Row]:
        values = {
            name: [one[metric] for one in rounds if metric in one] for name, rounds in self.samples.items() if rounds
        }
        base = median(values[self.base]) if values.get(self.base) else None
        return [
            Row(
                metric,
                name,
                median(found),
                min(found),
                max(found),
                len(found),
                median(found) / base if base and name != self.base else None,
            )
            for name, found in values.items()
            if found
        ]


def order(contenders: Sequence[Contender], round_number: int) -> Sequence[Contender]:
    """Forwards in even rounds, backwards in odd ones, so that nobody always follows the same neighbour."""
    return contenders if round_number % 2 == 0 else tuple(reversed(contenders))


async def in_turns(result: Result, contenders: Sequence[Contender], rounds: int = ROUNDS) -> Result:
    """Let everybody run `rounds` times, after one round that is not counted: caches are cold in it."""
    for contender in contenders:
        result.samples[contender.name] = []
    for number in range(-1, rounds):
        for contender in order(contenders, number):
            sample = None if contender.name in result.skipped else await _round(result, contender, number)
            if number >= 0 and sample is not None:
                result.samples[contender.name].append(dict(sample))
    return result


async def _round(result: Result, contender: Contender, number: int) -> Sample | None:
    """One round; a failure says whose it was. None where an optional contender failed."""
    where = f"in round {number + 1} of {contender.name}"
    try:
        return await contender.run()
    except HostlerError as error:
        if contender.optional:
            result.skipped[contender.name] = f"failed {where}: {error}"
            return None
        error.add_note(where)
        raise


def table(result: Result) -> str:
    """The result for people."""
    lines = [f"{result.name}", f"  {'metric':<40}{'who':<10}{'median':>9}{'low':>9}{'high':>9}  ratio to {result.base}"]
    for row in result.rows():
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x"
        lines.append(f"  {row.metric:<40}{row.contender:<10}{row.median:>9.2f}{row.low:>9.2f}{row.high:>9.2f}  {ratio}")
    lines += [f"  without {who}: {why}" for who, why in result.skipped.items()]
    lines += [f"  {key}: {value}" for key, value in result.notes.items()]
    return "\n".join(lines)
