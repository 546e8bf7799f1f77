"""How bench_recording.py shows what it has measured."""

from collections.abc import Callable, Sequence
from statistics import median

from shapes import TITLES, Sample

Taken = dict[tuple[str, str, str], list[Sample]]
"""The samples by database, shape and contender, in the order of the repeats."""

RAW = "raw "
"""How the names of the drivers begin."""


def ratios(of: Sequence[Sample], to: Sequence[Sample]) -> list[float]:
    """Return the ratios of what was measured in the same repeat."""
    return [one.rate / other.rate for one, other in zip(of, to, strict=True)]


def medians(samples: Sequence[Sample]) -> tuple[float, float, float, float]:
    """Return the medians of rate, p50 and p99, and the longest call of all."""
    rate, p50, p99 = (median(getattr(sample, what) for sample in samples) for what in ("rate", "p50", "p99"))
    return rate, p50, p99, max(sample.longest for sample in samples)


def print_table(title: str, taken: dict[str, list[Sample]], reference: Callable[[str], str]) -> None:
    """Print the rates, the ratios to what each refers to, and the latencies of one call."""
    print(f"\n| {title:44} | pairs/s | ratio min / median / max | p50 ms |   p99 ms | longest ms |")
    print(f"|{'-' * 46}|--------:|-------------------------:|-------:|---------:|-----------:|")
    for name, samples in taken.items():
        ratio = "-"
        to = reference(name)
        if to in taken and to != name:
            found = ratios(samples, taken[to])
            ratio = f"{min(found):.2f} / {median(found):.2f} / {max(found):.2f}"
        rate, p50, p99, longest = medians(samples)
        print(f"| {name:44} | {rate:7,.0f} | {ratio:>24} | {p50:6.2f} | {p99:8.2f} | {longest:10,.0f} |", flush=True)


def print_summary(taken: Taken) -> None:
    """Print what was measured by shape, a column a database, as docs/performance.md shows it."""
    databases = list(dict.fromkeys(database for database, _, _ in taken))
    for shape, title in TITLES.items():
        of_shape = {(database, _row(name)): samples for (database, of, name), samples in taken.items() if of == shape}
        rows = list(dict.fromkeys(row for _, row in of_shape))
        if not rows:
            continue
        for what, cell in ((title, _rate_cell), (f"{title}, one call: p50 / p99 / longest ms", _latency_cell)):
            print(f"\n| {what} | {' | '.join(databases)} |\n|---|{'---|' * len(databases)}")
            for row in rows:
                cells = [
                    cell(of_shape[database, row], of_shape.get((database, _DRIVER), []))
                    if (database, row) in of_shape
                    else ""
                    for database in databases
                ]
                print(f"| {row} | {' | '.join(cells)} |", flush=True)


_DRIVER = "the driver alone"


def _row(name: str) -> str:
    return _DRIVER if name.startswith(RAW) else name


def _rate_cell(samples: Sequence[Sample], driver: Sequence[Sample]) -> str:
    if samples is driver or not driver:
        return f"{medians(samples)[0]:,.0f} pairs/s"
    found = ratios(samples, driver)
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def _latency_cell(samples: Sequence[Sample], _driver: Sequence[Sample]) -> str:
    _, p50, p99, longest = medians(samples)
    return f"{p50:.2f} / {p99:.2f} / {longest:,.0f}"
