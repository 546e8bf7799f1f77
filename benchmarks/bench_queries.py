"""How fast questions are answered in 10,000,000 runs: against the raw driver, and against a history of 10,000 runs.

    python benchmarks/bench_queries.py [--sqlite-dir DIR] [--postgresql URL] [--size 10000000] [--rounds 20] [--only X]

The raw driver has a connection of its own that it keeps, the best SQL known for each question, and builds the same
``TaskRun``s. A round asks every question of both, in both sizes, in random order and with the same arguments, 100 times
in a row. Before, answers are compared. The histories are described in ``many_runs.py``; they are made where they are
missing, which takes ten minutes and 8 GB, and kept. ``--size 10000`` is quick, and tells no growth.
"""

import argparse
import random
import sqlite3
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from many_runs import NOW, Shape, postgresql_database, sqlite_file, task
from sqlalchemy import make_url

from taskruns import RunFilter, TaskPhase, TaskRun, TaskRunHistory, Window
from taskruns.model import PROBLEMS

SMALL = 10_000
HOUR_AGO = NOW - timedelta(hours=1)
MINUTE = timedelta(minutes=1)
PHASES = {phase.value: phase for phase in TaskPhase}
COLUMNS = (
    "task_id, attempt, phase, started_at, finished_at, error, exit_code, recovered, start_inferred,"
    " source, submission, source_attempt, supervisor_id"
)
OF_TASK = f"SELECT {COLUMNS} FROM task_runs WHERE task_id ="


class Raw:
    """The driver alone. Each method is a question; ``given`` is what it asks for."""

    mark: str
    tasks_sql: str

    def __init__(self) -> None:
        mark, select = self.mark, f"SELECT {COLUMNS} FROM task_runs WHERE"
        is_problem = "phase IN ('failed', 'timeout', 'exhausted')"
        self.newest_sql = f"{OF_TASK} {mark} ORDER BY attempt DESC LIMIT 50"
        self.next_sql = f"{OF_TASK} {mark} AND attempt < {mark} ORDER BY attempt DESC LIMIT 50"
        self.active_sql = f"{select} finished_at IS NULL ORDER BY started_at"
        self.problems_sql = f"{select} {is_problem} AND finished_at >= {mark} ORDER BY finished_at DESC LIMIT 50"
        self.minute_sql = f"{select} started_at >= {mark} AND started_at < {mark} ORDER BY started_at DESC"
        self.stats_sql = f"SELECT phase, started_at, finished_at FROM task_runs WHERE task_id = {mark}"
        self.last_sql = f"{OF_TASK} {mark} AND phase = {mark} ORDER BY attempt DESC LIMIT 1"

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        raise NotImplementedError

    def runs(self, sql: str, *values: Any) -> list[TaskRun]:
        raise NotImplementedError

    def moment(self, at: datetime) -> Any:
        return at

    def durations(self, rows: Sequence[tuple[Any, ...]]) -> list[timedelta]:
        return [end - start for _, start, end in rows if end is not None]

    def newest(self, _given: None) -> list[TaskRun]:
        return self.runs(self.newest_sql, "paged")

    def next_page(self, _given: None) -> list[TaskRun]:
        return self.runs(self.next_sql, "paged", 101)

    def active(self, _given: None) -> list[TaskRun]:
        return self.runs(self.active_sql)

    def problems(self, _given: None) -> list[TaskRun]:
        return self.runs(self.problems_sql, self.moment(HOUR_AGO))

    def minute(self, given: datetime) -> list[TaskRun]:
        return self.runs(self.minute_sql, self.moment(given), self.moment(given + MINUTE))

    def tasks_page(self, given: str) -> list[TaskRun]:
        return self.runs(self.tasks_sql, given)

    def stats(self, _given: None) -> dict[str, Any]:
        rows = self.rows(self.stats_sql, "fifty")
        phases = Counter(row[0] for row in rows)
        judged = phases["succeeded"] + phases["failed"] + phases["timeout"] + phases["exhausted"]
        durations = sorted(self.durations(rows))
        count = len(durations)
        found = {f"p{percent}": durations[-(-count * percent // 100) - 1] for percent in (50, 95, 99)}
        found |= {"mean": sum(durations, timedelta()) / count, "min": durations[0], "max": durations[-1]}
        milliseconds = {name: duration / timedelta(milliseconds=1) for name, duration in found.items()}
        rate = phases["succeeded"] / judged
        return {"runs": len(rows), "byPhase": dict(phases), "successRate": rate, "durationMs": milliseconds}

    def last_success(self, _given: None) -> list[TaskRun]:
        return self.runs(self.last_sql, "flaky", "succeeded")


class RawSqlite(Raw):
    """The module sqlite3."""

    mark = "?"
    tasks_sql = (
        "WITH RECURSIVE ids (id, n) AS (SELECT min(task_id), 1 FROM task_runs WHERE task_id > ?"
        " UNION ALL SELECT (SELECT min(task_id) FROM task_runs WHERE task_id > id), n + 1 FROM ids"
        f" WHERE id IS NOT NULL AND n < 100) SELECT {COLUMNS} FROM ids JOIN task_runs ON task_id = id"
        " AND attempt = (SELECT max(attempt) FROM task_runs AS newest WHERE task_id = id) ORDER BY task_id"
    )

    def __init__(self, url: str) -> None:
        super().__init__()
        self.connection = sqlite3.connect(make_url(url).database or "", isolation_level=None)

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, values).fetchall()

    def runs(self, sql: str, *values: Any) -> list[TaskRun]:
        at = datetime.fromisoformat
        # By place, and from a text with its zone: what takes the least time.
        return [
            TaskRun(
                row[0],
                row[1],
                PHASES[row[2]],
                at(row[3] + "+00:00"),
                row[4] and at(row[4] + "+00:00"),
                row[5],
                row[6],
                row[7] == 1,
                row[8] == 1,
                *row[9:],
            )
            for row in self.connection.execute(sql, values).fetchall()
        ]

    def moment(self, at: datetime) -> str:
        return at.replace(tzinfo=None).isoformat(" ", "microseconds")

    def durations(self, rows: Sequence[tuple[Any, ...]]) -> list[timedelta]:
        at = datetime.fromisoformat
        return [at(end) - at(start) for _, start, end in rows if end is not None]


class RawPostgresql(Raw):
    """Psycopg, with a binary cursor; statements are prepared."""

    mark = "%s"
    tasks_sql = (
        "WITH RECURSIVE ids (id, n) AS ((SELECT task_id, 1 FROM task_runs WHERE task_id > %s ORDER BY 1 LIMIT 1)"
        " UNION ALL SELECT task_id, n + 1 FROM ids CROSS JOIN LATERAL"
        " (SELECT task_id FROM task_runs WHERE task_id > id ORDER BY 1 LIMIT 1) AS following WHERE n < 100)"
        f" SELECT {COLUMNS} FROM ids CROSS JOIN LATERAL"
        " (SELECT * FROM task_runs WHERE task_id = id ORDER BY attempt DESC LIMIT 1) AS latest ORDER BY task_id"
    )

    def __init__(self, url: str) -> None:
        super().__init__()
        connection = psycopg.connect(url, autocommit=True, options="-c TimeZone=UTC")
        self.cursor = connection.cursor(binary=True)

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.cursor.execute(sql, values, prepare=True).fetchall()

    def runs(self, sql: str, *values: Any) -> list[TaskRun]:
        rows = self.cursor.execute(sql, values, prepare=True).fetchall()
        return [TaskRun(task_id, attempt, PHASES[phase], *others) for task_id, attempt, phase, *others in rows]


class Taskruns:
    """The library."""

    def __init__(self, url: str) -> None:
        self.history = TaskRunHistory.connect(url)
        self.cursor = self.history.runs("paged", limit=50).next_cursor

    def newest(self, _given: None) -> list[TaskRun]:
        return self.history.runs("paged", limit=50).runs

    def next_page(self, _given: None) -> list[TaskRun]:
        return self.history.runs("paged", limit=50, after=self.cursor).runs

    def active(self, _given: None) -> list[TaskRun]:
        return self.history.active_runs()

    def problems(self, _given: None) -> list[TaskRun]:
        return self.history.runs(RunFilter(phases=PROBLEMS, finished=Window(HOUR_AGO, None)), limit=50).runs

    def minute(self, given: datetime) -> list[TaskRun]:
        return self.history.runs(RunFilter(started=Window(given, given + MINUTE)), limit=500).runs

    def tasks_page(self, given: str) -> list[TaskRun]:
        return self.history.tasks(limit=100, after=given)

    def stats(self, _given: None) -> Any:
        return self.history.stats("fifty")

    def last_success(self, _given: None) -> list[TaskRun]:
        run = self.history.last_run("flaky", phases=TaskPhase.SUCCEEDED)
        return [] if run is None else [run]


def nothing(_chance: random.Random, _shape: Shape) -> None:
    return None


def a_minute(chance: random.Random, _shape: Shape) -> datetime:
    return NOW - timedelta(seconds=chance.randrange(60, 7200))  # which are all of the small history


def a_task(chance: random.Random, shape: Shape) -> str:
    """Return a task that 100 others follow."""
    following = chance.randrange(shape.tasks - 99)
    return task(following - 1) if following else "paged"


@dataclass(frozen=True)
class Question:
    """What is asked: the method that asks it, what draws its argument, and how often a round asks it in a row."""

    name: str
    method: str
    draw: Callable[[random.Random, Shape], Any] = nothing
    times: int = 100
    only_large: bool = False


QUESTIONS = [
    Question("newest 50 runs of a task", "newest"),
    Question("the next page of 50", "next_page"),
    Question("active runs", "active"),
    Question("newest 50 problems of the last hour", "problems"),
    Question("all runs of a minute", "minute", a_minute),
    Question("page of 100 tasks with their latest run", "tasks_page", a_task),
    Question("statistics of a task of 50 runs", "stats"),
    Question("last success, 90,000 attempts back", "last_success", times=1, only_large=True),
]


@dataclass(frozen=True)
class Contest:
    """Both contenders on one history."""

    shape: Shape
    raw: Raw
    ours: Taskruns

    def check(self, question: Question, chance: random.Random) -> int:
        """Compare some answers; return the number of runs that one of them is made of."""
        for _ in range(question.times):
            given = question.draw(chance, self.shape)
            raw, ours = getattr(self.raw, question.method)(given), getattr(self.ours, question.method)(given)
            if question.method == "stats":
                ours = ours.to_wire()
                assert (raw["runs"], raw["byPhase"]) == (ours["runs"], ours["byPhase"]), (raw, ours)
                assert abs(raw["successRate"] - ours["successRate"]) < 0.001, (raw, ours)
                for name, milliseconds in raw["durationMs"].items():
                    assert abs(milliseconds - ours["durationMs"][name]) <= 1, (raw, ours)
            else:
                assert raw == ours, (question.name, raw, ours)
        return raw["runs"] if question.method == "stats" else len(raw)


def timed(ask: Callable[[Any], Any], arguments: list[Any]) -> float:
    """Return the microseconds that an answer takes."""
    begun = time.perf_counter()
    for given in arguments:
        ask(given)
    return (time.perf_counter() - begun) * 1e6 / len(arguments)


def asked(
    contests: list[Contest], questions: list[Question], rounds: int, chance: random.Random
) -> dict[tuple[Question, Contest, str], list[float]]:
    """Ask everything in each round, and return the microseconds."""
    taken: dict[tuple[Question, Contest, str], list[float]] = {}
    for _ in range(rounds):
        for question in chance.sample(questions, len(questions)):
            due = []
            for contest in contests if not question.only_large else contests[:1]:
                arguments = [question.draw(chance, contest.shape) for _ in range(question.times)]
                due += [(contest, who, arguments) for who in ("raw", "ours")]
            chance.shuffle(due)
            for contest, who, arguments in due:
                ask = getattr(getattr(contest, who), question.method)
                taken.setdefault((question, contest, who), []).append(timed(ask, arguments))
    return taken


def measure(contests: list[Contest], questions: list[Question], rounds: int) -> None:
    """Ask, and print a table. The first contest is what is measured, a second one what its growth refers to."""
    chance = random.Random(1)
    large = contests[0]
    if not large.shape.is_large:
        questions = [question for question in questions if not question.only_large]
    rows = {question: large.check(question, chance) for question in questions}
    for contest in contests[1:]:
        for question in questions:
            if not question.only_large:
                contest.check(question, chance)
    taken = asked(contests, questions, rounds, chance)
    print(f"{'':40} {'raw us':>9} {'taskruns us':>11}  {'ratio min/median/max':>20} {'growth':>6} {'rows':>5}")
    for question in questions:
        raw, ours = taken[question, large, "raw"], taken[question, large, "ours"]
        ratios = sorted(one / other for one, other in zip(raw, ours, strict=True))
        ratio = f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}"
        growth = "-"
        if len(contests) > 1 and not question.only_large:
            pairs = zip(ours, taken[question, contests[1], "ours"], strict=True)
            growth = f"{statistics.median(one / other for one, other in pairs):.2f}"
        times = f"{statistics.median(raw):9,.0f} {statistics.median(ours):11,.0f}"
        print(f"{question.name:40} {times}  {ratio:>20} {growth:>6} {rows[question]:5}", flush=True)


def main() -> None:
    """Make what is missing, then measure each database and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sqlite-dir", type=Path, help="where the SQLite files are kept; by default they are not")
    parser.add_argument("--postgresql", help="the URL of a database from which others can be made")
    parser.add_argument("--size", type=int, default=10_000_000, help="runs of the history that is measured")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the questions to ask")
    options = parser.parse_args()
    questions = [question for question in QUESTIONS if any(part in question.name for part in options.only)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.sqlite_dir or Path(temporary)
        for tasks, small_tasks in ((options.size // 50, SMALL // 50), (100, 100)):
            shapes = [Shape(tasks, options.size // tasks)]
            if options.size != SMALL:
                shapes.append(Shape(small_tasks, SMALL // small_tasks))
            urls = [sqlite_file(shape, folder) for shape in shapes]
            contests = [Contest(shape, RawSqlite(url), Taskruns(url)) for shape, url in zip(shapes, urls, strict=True)]
            print(f"\nSQLite, {tasks:,} tasks x {options.size // tasks:,} runs")
            measure(contests, questions, options.rounds)
            if options.postgresql:
                urls = [postgresql_database(shape, make_url(options.postgresql)) for shape in shapes]
                contests = [
                    Contest(shape, RawPostgresql(url), Taskruns(url)) for shape, url in zip(shapes, urls, strict=True)
                ]
                print(f"\nPostgreSQL, {tasks:,} tasks x {options.size // tasks:,} runs")
                measure(contests, questions, options.rounds)


if __name__ == "__main__":
    main()
