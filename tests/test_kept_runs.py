"""Runs that were kept are written many at once just as they are one by one, whoever else writes meanwhile."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from sqlalchemy import Connection, Engine, delete
from sqlalchemy.exc import DataError
from test_spool import FROM, Kept, outcome, run

from taskruns import TaskPhase, TaskRun, TaskRunHistory, bulk, engine, kept as kept_runs, replay as replaying
from taskruns.kept import Line, Mark, of_tasks, write_few, write_many
from taskruns.schema import task_runs
from taskruns.url import parse_url

TASKS = ("job", "other")
MOMENTS = st.integers(0, 3)


@st.composite
def runs(draw: st.DrawFn) -> TaskRun:
    one = run(draw(MOMENTS), draw(st.sampled_from(TASKS)), submission=draw(st.sampled_from([None, "s"])))
    return replace(one, source=draw(st.sampled_from(["here", "here", None])))


outcomes = st.builds(
    outcome,
    st.integers(0, 5),
    st.sampled_from([TaskPhase.FAILED, TaskPhase.EXHAUSTED, TaskPhase.TIMEOUT, TaskPhase.CANCELED]),
    error=st.sampled_from([None, "no"]),
    exit_code=st.sampled_from([None, 1]),
) | st.builds(outcome, st.integers(0, 5))
lines = st.lists(
    st.builds(Line, st.just(b""), st.just(0), run=runs(), is_forgotten=st.sampled_from([False, False, True]))
    | st.builds(Line, st.just(b""), st.just(0), run=runs(), outcome=outcomes)
    | st.builds(Line, st.just(b""), st.just(0), run=runs(), outcome=outcomes, attempt=st.integers(1, 4)),
    min_size=1,
    max_size=12,
)


@st.composite
def stored(draw: st.DrawFn) -> list[TaskRun]:
    """Make what a database may have of some tasks: active, ended and recovered runs, with gaps between the numbers."""
    last = dict.fromkeys(TASKS, 0)
    found = []
    for one in draw(st.lists(runs(), max_size=4)):
        last[one.task_id] += draw(st.integers(1, 2))
        numbered = one.numbered(last[one.task_id])
        if draw(st.booleans()):
            numbered = numbered.ended(draw(outcomes))
            if numbered.phase is TaskPhase.FAILED:
                numbered = replace(numbered, recovered=draw(st.booleans()))
        found.append(numbered)
    return found


def one_by_one(connection: Connection, lines: list[Line]) -> Counter[Mark | None]:
    """Write lines as they are where they are not written together, and return their marks."""
    return Counter(
        mark
        for of_task in of_tasks(lines).values()
        for mark in write_few(connection, [line for line, _ in of_task])
        if mark is not None
    )


def written(own: Engine, before: list[TaskRun], write: Callable[[Connection], Any]) -> tuple[Any, list[Any]]:
    """Return what a function returns, and what it makes of a table with some runs."""
    with own.connect() as connection:
        with engine.transaction(connection):
            connection.execute(delete(task_runs))
            bulk.insert_rows(connection, list(map(bulk.row_of, before)))
        result = write(connection)
        rows = connection.execute(task_runs.select().order_by(task_runs.c.task_id, task_runs.c.attempt)).all()
    return result, [tuple(row) for row in rows]


def test_many_at_once_come_out_as_one_by_one(database: str) -> None:
    own = engine.create(parse_url(database))

    @settings(max_examples=150 if own.dialect.name == "sqlite" else 30)
    @given(stored(), lines, st.integers(1, 12))
    def check(before: list[TaskRun], lines: list[Line], size: int) -> None:
        lines = [replace(line, begin=place) for place, line in enumerate(lines)]

        def at_once(connection: Connection) -> Counter[Mark | None]:
            marks: Counter[Mark | None] = Counter()
            for first in range(0, len(lines), size):
                marks += one_by_one(connection, write_many(connection, lines[first : first + size]))
            return marks

        expected = written(own, before, lambda connection: one_by_one(connection, lines))
        assert written(own, before, at_once) == expected
        _, after = expected
        of_before = [TaskRun(*row) for row in after]
        again = written(own, of_before, lambda connection: one_by_one(connection, lines))
        assert written(own, of_before, at_once) == again  # as after a kill

    check()
    own.dispose()


def test_plain_lines_leave_nothing_to_do_one_by_one(database: str) -> None:
    own = engine.create(parse_url(database))
    ended = [Line(b"", 2 * place, run=run(place, f"task {place % 150}")) for place in range(700)]
    ended += [replace(line, begin=line.begin + 1, outcome=outcome(800)) for line in ended]
    active = run(900, "task 7")
    last = [Line(b"", 5000, run=active), Line(b"", 5001, run=active, outcome=outcome(901), attempt=6)]
    left, rows = written(own, [], lambda connection: write_many(connection, [*ended, last[0]]))
    assert (left, len(rows), sum(row[2] is TaskPhase.SUCCEEDED for row in rows)) == ([], 701, 700)
    assert [row[1] for row in rows if row[0] == "task 7"] == list(range(1, 7))
    before = [TaskRun(*row) for row in rows]
    before[0] = replace(before[0], phase=TaskPhase.FAILED, error="not observed", recovered=True)
    last.append(replace(ended[700], begin=6000))  # of task 0
    left, rows = written(own, before, lambda connection: write_many(connection, last))
    assert (left, sum(row[2] is TaskPhase.SUCCEEDED for row in rows)) == ([], 701)
    own.dispose()


@pytest.fixture(params=["postgresql", "mariadb"])
def kept(request: pytest.FixtureRequest) -> Iterator[Kept]:
    """What is kept for a server: on SQLite there is nobody else meanwhile."""
    found = Kept(request.getfixturevalue(request.param))
    yield found
    found.engine.dispose()


def meanwhile(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object], *places: str) -> None:
    """Have something done once, before the last of these places is reached, in whatever order they are."""
    left = set(places)

    def wrap(place: str) -> None:
        reach = getattr(kept_runs, place)

        def reach_later(*arguments: Any) -> Any:
            if left == {place}:
                do()
            left.discard(place)
            return reach(*arguments)

        monkeypatch.setattr(kept_runs, place, reach_later)

    for place in places:
        wrap(place)


@pytest.mark.parametrize("places", [("_last_numbers", "_stored"), ("key_of",)], ids=["between", "after"])
@pytest.mark.parametrize("is_same", [True, False])
def test_run_that_another_adds_meanwhile_is_neither_doubled_nor_an_obstacle(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, places: tuple[str, ...], is_same: bool
) -> None:
    with TaskRunHistory.connect(kept.database, source="here") as history:
        opened = history.open_run("job 5", started_at=FROM)
    kept.spool.add_end(opened, outcome(1), attempt=1)
    for number in range(9):
        one = kept.spool.add_start(run(number + 10, f"job {number}"))
        kept.spool.add_end(one, outcome(number + 11))

    def add() -> None:
        with TaskRunHistory.connect(kept.database, source="here" if is_same else "there") as history:
            history.open_run("job 3", started_at=FROM + timedelta(seconds=13))

    meanwhile(monkeypatch, add, *places)
    assert kept.replay().marks == {}
    for number in range(9):
        found = [(one.attempt, one.source, one.phase.value) for one in kept.runs(f"job {number}")]
        expected = [("here", "succeeded")]
        if number == 5:
            expected = [("here", "succeeded")] * 2
        elif number == 3 and not is_same:
            expected = [("there", "running"), ("here", "succeeded")]
        assert found == [(place + 1, *one) for place, one in enumerate(expected)]


def test_run_that_another_closes_meanwhile_is_contradicted(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    with TaskRunHistory.connect(kept.database, source="here") as history:
        for number in range(3):
            opened = history.open_run(f"job {number}", started_at=FROM)
            kept.spool.add_end(opened, outcome(1), attempt=1)

    def close() -> None:
        with TaskRunHistory.connect(kept.database) as history:
            history.close_run("job 1", 1, TaskPhase.CANCELED)

    meanwhile(monkeypatch, close, "key_of")
    assert kept.replay().marks == {Mark.CONTRADICTED: 1}
    assert [kept.runs(f"job {number}")[0].phase.value for number in range(3)] == ["succeeded", "canceled", "succeeded"]


def test_task_that_somebody_has_locked_holds_up_no_other_for_long(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        kept.spool.add_end(run(number, f"job {number}"), outcome(number + 1))
    own = engine.create(kept.url)
    with own.connect() as connection:
        connection.execution_options(isolation_level="READ COMMITTED")
        bulk.insert_rows(connection, [bulk.row_of(run(90, "job 4"))])
        meanwhile(monkeypatch, connection.commit, "write_few")  # for this one waits as long as it takes
        assert kept.replay().events == 6
    own.dispose()
    assert [len(kept.runs(f"job {number}")) for number in range(6)] == [1, 1, 1, 1, 2, 1]


def test_task_that_the_database_does_not_take_stands_alone(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, insert, sizes = Kept(sqlite), bulk.insert_rows, list[int]()

    def refuse(connection: Connection, rows: list[bulk.Row]) -> None:
        if any(row[0] == "job 3" for row in rows):
            raise DataError("", None, Exception("too long"))
        sizes.append(len(rows))
        insert(connection, rows)

    monkeypatch.setattr(bulk, "insert_rows", refuse)
    for number in range(8):
        kept.spool.add_end(run(number, f"job {number}"), outcome(9))
    assert kept.replay().marks == {}
    assert sorted(sizes) == [1, 2, 4]
    assert [len(kept.runs(f"job {number}")) for number in range(8)] == [1] * 8
    kept.engine.dispose()


def test_go_that_runs_out_of_time_amid_lines_that_are_not_plain_is_gone_on_with(
    sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(sqlite)
    monkeypatch.setattr(replaying, "_LINES_ONE_BY_ONE", 2)
    for number in range(5):
        kept.spool.add_end(run(number, f"job {number}"), outcome(9))
    [path] = kept.files
    content = path.read_bytes().replace(b'"job 4"', b'" "')  # which cannot be used
    kept.replay()
    path.write_bytes(content.replace(b"TaskStopped", b"TaskCanceled"))
    goes = [kept.replay(seconds=0)]
    while not goes[-1].is_complete:
        goes.append(kept.replay(seconds=0))
    assert [go.marks[Mark.CONTRADICTED] for go in goes] == [2, 2, 0]
    assert [go.marks[Mark.REJECTED] for go in goes] == [0, 0, 1]
    kept.engine.dispose()
