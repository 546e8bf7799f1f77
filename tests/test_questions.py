"""The ten questions of docs/sql.md, asked in each database's own client, are answered as by plain Python."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest
from clients import BLOCKS, TEXT, Client
from sqlalchemy import create_engine, insert

from taskruns import PROBLEMS, TaskPhase, TaskRun, TaskRunHistory, schema

TWO = datetime(2026, 11, 24, 2, tzinfo=UTC)
THREE = TWO + timedelta(hours=1)
MICROSECOND = timedelta(microseconds=1)
DIFFERENT: dict[str, tuple[str, str]] = {
    name.partition(",")[0].lower(): (a_day_ago, duration)
    for name, a_day_ago, duration in re.findall(r"^\| ([\w, ]+) \| `(.*)` \| `(.*_at\b.*)` \|", TEXT, re.MULTILINE)
}
"""What the document gives for each database: a day ago, and a duration."""
WELL_UNTIL = {
    "backup": THREE + timedelta(hours=2),
    "Backup": datetime.max.replace(tzinfo=UTC),
    "backup-2": TWO - timedelta(hours=3),
    "Zürich \N{SNOWMAN}": datetime.max.replace(tzinfo=UTC),
    "never well": datetime.min.replace(tzinfo=UTC),
}
"""Each task, and when the last run starts that ends well."""
WATCHER: dict[str, Any] = {
    "id": 2**52 + 1,
    "source": "web-1",
    "host": "web-1",
    "pid": 4711,
    "started_at": TWO,
    "heartbeat_at": THREE,
}

Row = tuple[Any, ...]


def history_of(seed: int) -> list[TaskRun]:
    """Return runs around two and three o'clock; no two have a time in common, the borders are met exactly."""
    choose = random.Random(seed)
    starts = [TWO, THREE, THREE - MICROSECOND]
    starts += [
        TWO + timedelta(microseconds=2 * number * 10**6 + 1) for number in choose.sample(range(-9000, 9000), 397)
    ]
    attempts: Counter[str] = Counter()
    runs = []
    for started_at in sorted(starts):
        task_id = choose.choice(list(WELL_UNTIL))
        attempts[task_id] += 1
        weights = [1, 9 if started_at < WELL_UNTIL[task_id] else 0, 2, 2, 1, 2]
        [phase] = choose.choices([phase for phase in TaskPhase if phase is not TaskPhase.PENDING], weights)
        is_active, is_problem = phase is TaskPhase.RUNNING, phase in PROBLEMS
        run = TaskRun(
            task_id,
            attempts[task_id],
            phase,
            started_at,
            finished_at=None if is_active else started_at + timedelta(microseconds=choose.randrange(5 * 10**9)),
            error=choose.choice(["disk full", "it's \N{SNOWMAN}", None]) if is_problem else None,
            exit_code=None if is_active else choose.choice([1, 3, 139, None]) if is_problem else 0,
            source=choose.choice(["web-1", "web-2", None]),
            submission=choose.choice([None, *(f"request {number}" for number in range(12))]),
            supervisor_id=WATCHER["id"] if is_active and attempts[task_id] % 2 else None,
        )
        runs.append(run)
    return runs


def of_task(runs: Iterable[TaskRun]) -> list[TaskRun]:
    return sorted((run for run in runs if run.task_id == "backup"), key=lambda run: run.attempt)


def by_task(runs: Iterable[TaskRun]) -> Mapping[str, list[TaskRun]]:
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.task_id, run.attempt)):
        groups[run.task_id].append(run)
    return groups


def ended(run: TaskRun) -> datetime:
    assert run.finished_at is not None
    return run.finished_at


def last(runs: list[TaskRun]) -> Iterable[Row]:
    run = of_task(runs)[-1]
    return [(run.attempt, run.phase, run.started_at, run.finished_at, run.exit_code, run.error)]


def running(runs: list[TaskRun]) -> Iterable[Row]:
    for run in sorted((run for run in runs if run.is_active), key=lambda run: run.started_at):
        watcher = ("web-1", 4711, THREE) if run.supervisor_id else (None, None, None)
        yield run.task_id, run.attempt, run.started_at, run.source, *watcher


def problems(runs: list[TaskRun]) -> Iterable[Row]:
    found = [run for run in runs if run.phase in PROBLEMS and ended(run) >= TWO]
    for run in sorted(found, key=ended, reverse=True):
        yield run.task_id, run.attempt, run.phase, run.finished_at, run.exit_code, run.error


def started(runs: list[TaskRun]) -> Iterable[Row]:
    for run in sorted(runs, key=lambda run: run.started_at):
        if TWO <= run.started_at < THREE:
            yield run.task_id, run.attempt, run.phase, run.started_at, run.finished_at


def tasks(runs: list[TaskRun]) -> Iterable[Row]:
    for task_id, those in by_task(runs).items():
        run = those[-1]
        yield task_id, run.attempt, run.phase, run.started_at, run.finished_at


def rates(runs: list[TaskRun]) -> Iterable[Row]:
    for task_id, those in by_task(run for run in runs if run.started_at >= TWO).items():
        count = Counter(run.phase for run in those)
        good, bad = count[TaskPhase.SUCCEEDED], sum(count[phase] for phase in PROBLEMS)
        rate = (Decimal(100 * good) / (good + bad)).quantize(Decimal("0.1"), ROUND_HALF_UP)
        yield task_id, len(those), bad, rate


def stale(runs: list[TaskRun]) -> Iterable[Row]:
    for task_id, those in by_task(runs).items():
        latest = max((ended(run) for run in those if run.phase is TaskPhase.SUCCEEDED), default=None)
        if latest is None or latest < TWO:
            yield task_id, latest


def streak(runs: list[TaskRun]) -> Iterable[Row]:
    count = 0
    for run in of_task(runs):
        count = 0 if run.phase is TaskPhase.SUCCEEDED else count + (run.phase in PROBLEMS)
    return [(count,)]


def attempts(runs: list[TaskRun]) -> Iterable[Row]:
    submissions = defaultdict(list)
    for run in of_task(runs):
        submissions[run.submission or run.attempt].append(run.phase)
    sizes = Counter(len(phases) for phases in submissions.values() if TaskPhase.SUCCEEDED in phases)
    return sorted(sizes.items())


def exits(runs: list[TaskRun]) -> Iterable[Row]:
    codes = defaultdict(list)
    for run in of_task(runs):
        if run.exit_code is not None:
            codes[run.exit_code].append(ended(run))
    rows = [(code, len(times), max(times)) for code, times in codes.items()]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


QUESTIONS: list[Callable[[list[TaskRun]], Iterable[Row]]] = [
    *(last, running, problems, started, tasks, rates, stale, streak, attempts, exits)
]


def told(value: Any) -> str:
    """Return a value as :func:`answer` has it."""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S.%f}"
    return "" if value is None else str(value)


def answer(lines: Iterable[str]) -> list[list[str]]:
    """Return what a client has printed, with what differs between them made the same."""

    def value(cell: str) -> str:
        if re.match(r"\d{4}-\d\d-\d\d ", cell):
            return told(datetime.fromisoformat(cell))
        return "" if cell == "NULL" else cell

    return [[value(cell) for cell in re.split(r"[|\t]", line)] for line in lines]


@pytest.fixture
def client(kind: str, database: str) -> Client:
    return Client(kind, database)


@pytest.fixture
def runs(database: str) -> list[TaskRun]:
    """The runs of a history, as plain Python gets them."""
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(insert(schema.supervisors), WATCHER)
        connection.execute(insert(schema.task_runs), list(map(asdict, history_of(5))))
    engine.dispose()
    with TaskRunHistory.connect(database) as history:
        return list(history.all_runs())


def ask(client: Client, statement: str) -> list[list[str]]:
    zone = ["reading"] if client.kind == "postgresql" else []
    return answer(client.run(*zone, statement))


def test_every_question_is_answered_as_by_python(client: Client, runs: list[TaskRun]) -> None:
    wrong = {}
    for question in QUESTIONS:
        expected = [list(map(told, row)) for row in question(runs)]
        assert expected
        found = ask(client, BLOCKS[question.__name__].strip())
        if found != expected:
            wrong[question.__name__] = (found, expected)
    assert not wrong


def test_durations_are_told_to_the_microsecond(client: Client, runs: list[TaskRun]) -> None:
    longest, (_, written), (_, duration) = BLOCKS["longest"].strip(), DIFFERENT["postgresql"], DIFFERENT[client.kind]
    assert written in longest
    found = ask(client, longest.replace(written, duration))
    durations = [(run.duration, run.attempt) for run in of_task(runs) if run.duration is not None]
    expected = sorted(durations, reverse=True)[:10]
    assert [(microseconds(row[3]) * MICROSECOND, int(row[0])) for row in found] == expected


def test_a_day_ago_is_by_the_clock_of_utc(client: Client) -> None:
    [[found]] = ask(client, f"SELECT {DIFFERENT[client.kind][0]};")
    age = datetime.now(UTC) - datetime.fromisoformat(found).replace(tzinfo=UTC)
    assert timedelta(hours=23, minutes=59) < age < timedelta(hours=24, minutes=1)


def microseconds(cell: str) -> int:
    """Return a duration that a client has printed: a number, or an interval of less than a day."""
    hours, colon, rest = cell.partition(":")
    if not colon:
        return int(cell)
    minutes, seconds = rest.split(":")
    return (int(hours) * 60 + int(minutes)) * 60 * 10**6 + int(Decimal(seconds) * 10**6)


@pytest.mark.parametrize("end", ["02:00:00.999999", "02:00:01.000000", "03:00:00.000499"])
def test_no_part_of_a_second_is_rounded(end: str, sqlite: str) -> None:
    start, end = "2026-11-24 01:59:59.999500", f"2026-11-24 {end}"
    values = f"SELECT '{start}' AS started_at, '{end}' AS finished_at"
    [found] = Client("sqlite", sqlite).run(f"SELECT {DIFFERENT['sqlite'][1]} FROM ({values});")
    assert int(found) * MICROSECOND == datetime.fromisoformat(end) - datetime.fromisoformat(start)
