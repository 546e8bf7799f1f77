"""What bench_recording.py is to show: medians of ratios measured side by side, and whether they are reached."""

from dataclasses import dataclass
from statistics import median

from shapes import TITLES
from tables import RAW, Taken, ratios


@dataclass(frozen=True)
class Target:
    """A ratio to reach: the contender's rate by the others', the fastest of them if there are several."""

    shape: str
    contender: str
    others: str
    """How their names begin."""
    at_least: dict[str, float]
    """By database."""


SQLITE, POSTGRESQL = "SQLite FULL", "PostgreSQL"
PLAIN, GROUPED = "taskruns", "taskruns, group commit"
TARGETS = [
    Target("one", PLAIN, RAW, {SQLITE: 0.75, POSTGRESQL: 0.85}),
    Target("threads", GROUPED, RAW, {SQLITE: 2.0, POSTGRESQL: 1.1}),
    Target("tasks", GROUPED, RAW, {SQLITE: 6, POSTGRESQL: 3}),
    Target("one", PLAIN, "Luigi", {SQLITE: 8, POSTGRESQL: 4}),
    Target("one", PLAIN, "Celery", {SQLITE: 5, POSTGRESQL: 4.5}),
    Target("one", PLAIN, "DBOS", {SQLITE: 3, POSTGRESQL: 2.5}),
]
MOST_GROWTH = 1.3
"""How many times as long a pair may take in a large table as in an empty one."""


def _line(case: str, target: str, measured: float | None, *, is_met: bool) -> str:
    shown, verdict = ("-", "not measured") if measured is None else (f"{measured:.2f}", "met" if is_met else "MISSED")
    return f"{case:70} {target:>8} {shown:>9}  {verdict}"


def print_targets(taken: Taken, large_suffix: str) -> None:
    """Print a line for each target; the suffix is what tells a contender in a large table."""
    print(f"\n{'targets':70} {'target':>8} {'median':>9}")
    for target in TARGETS:
        for database, at_least in target.at_least.items():
            ours = taken.get((database, target.shape, target.contender))
            others = [
                samples
                for (where, shape, name), samples in taken.items()
                if (where, shape) == (database, target.shape) and name.startswith(target.others)
            ]
            found = min((median(ratios(ours, other)) for other in others), default=None) if ours else None
            title = target.others.strip() if target.others == RAW else f"{target.others} (its fastest)"
            case = f"{database}, {TITLES[target.shape]}: {target.contender} / {title}"
            print(_line(case, f">= {at_least:g}", found, is_met=found is not None and found >= at_least))
    for database in (SQLITE, POSTGRESQL):
        empty, large = (taken.get((database, "growth", name)) for name in (PLAIN, f"{PLAIN}{large_suffix}"))
        times = 1 / median(ratios(large, empty)) if empty and large else None
        case = f"{database}: time of a pair in a large table / in an empty one"
        print(_line(case, f"<= {MOST_GROWTH}", times, is_met=times is not None and times <= MOST_GROWTH))
