"""Group commit: callers that come together are written together, and none of them notices the others."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from callers import CALLERS, FIRST, Batches, Callers, Work
from servers import Databases, available
from sqlalchemy import create_engine, event, text
from watchers import lose, until

from taskruns import (
    AttemptConflictError,
    RunClosedError,
    RunExistsError,
    RunNotFoundError,
    SchemaVersionError,
    TaskPhase,
    TaskRun,
    TaskRunHistory,
    aio,
    commit,
)
from taskruns.commit import Call
from taskruns.model import MAX_ATTEMPT, SUPERSEDED, Outcome, clean_error

NOON = datetime(2026, 11, 24, 12, 0, 0, 123456, tzinfo=UTC)
HOUR = timedelta(hours=1)
FAILED, SUCCEEDED = TaskPhase.FAILED, TaskPhase.SUCCEEDED

Connect = Callable[..., Callers]


SCENES = [("sqlite", "threads"), ("postgresql", "tasks"), ("mariadb", "threads")]
OTHERS = [("sqlite", "tasks"), ("postgresql", "threads"), ("mariadb", "tasks")]


@pytest.fixture(params=[*SCENES, *(pytest.param(scene, marks=pytest.mark.soak) for scene in OTHERS)], ids="-".join)
def scene(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A kind of database, and of callers."""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def kind(scene: tuple[str, str], databases: Databases) -> str:
    return available(scene[0], databases)


@pytest.fixture
def connect(scene: tuple[str, str], database: str) -> Iterator[Connect]:
    """Connects callers with the database."""
    connected: list[Callers] = []

    def of_database(**options: Any) -> Callers:
        connected.append(CALLERS[scene[1]](database, **options))
        return connected[-1]

    yield of_database
    for callers in connected:
        callers.close()


@pytest.fixture
def callers(connect: Connect) -> Callers:
    return connect()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(monkeypatch)


@pytest.fixture
def plain(database: str) -> Iterator[TaskRunHistory]:
    """Another history of the same database, without group commit."""
    with TaskRunHistory.connect(database, source="another") as history:
        yield history


def opening(task: str, **options: Any) -> Work:
    return lambda history: history.open_run(task, **options)


def closing(task: str, attempt: int, phase: TaskPhase = SUCCEEDED, **options: Any) -> Work:
    return lambda history: history.close_run(task, attempt, phase, **options)


def names(what: str, count: int) -> list[str]:
    return [f"{what} {number}" for number in range(count)]


def stored(plain: TaskRunHistory) -> dict[tuple[str, int], TaskRun]:
    return {(run.task_id, run.attempt): run for run in plain.all_runs() if run.task_id != FIRST}


def test_what_comes_together_is_one_batch(callers: Callers, batches: Batches, plain: TaskRunHistory) -> None:
    name, error = "'\"\\ é😀 %(x)s :y $.z", "1\n2\t\u2028\x7f" + "é😀\\" * 1000
    opened = callers.together(*[opening(task, submission=name) for task in names(name, 64)], batches=batches)
    assert [len(tasks) for tasks in batches.tasks] == [1, 64]
    assert all(
        run == TaskRun.starting(run.task_id, 1, started_at=run.started_at, source="here", submission=name)
        for run in opened
    )
    assert [run.task_id for run in opened] == names(name, 64)
    assert stored(plain) == {(run.task_id, 1): run for run in opened}
    works = [closing(run.task_id, 1, FAILED, error=error, exit_code=-1) for run in opened[:32]]
    works += [opening(f"more {run.task_id}") for run in opened[32:]]
    found = callers.together(*works, batches=batches)
    assert [len(tasks) for tasks in batches.tasks] == [1, 64]
    assert [(run.phase, run.error, run.exit_code) for run in found[:32]] == [(FAILED, clean_error(error), -1)] * 32
    expected = found + opened[32:]
    assert stored(plain) == {(run.task_id, run.attempt): run for run in expected}


BAD: dict[str, tuple[Work, type[Exception], bool]] = {
    "closed differently": (closing("closed", 1, FAILED), RunClosedError, True),
    "started at another time": (opening("closed", attempt=1, started_at=NOON + HOUR), RunExistsError, True),
    "taken by another": (opening("another's", attempt=1, started_at=NOON + HOUR), RunExistsError, True),
    "does not exist": (closing("nothing", 1), RunNotFoundError, True),
    "no more numbers": (opening("full"), AttemptConflictError, True),
    "no name": (opening(" "), ValueError, False),
    "no exit code": (closing("closed", 1, FAILED, exit_code=2**31), ValueError, False),
}
"""What cannot be done, the error, and whether that is known only to the database."""


def test_what_cannot_be_done_harms_nobody_else(callers: Callers, batches: Batches, plain: TaskRunHistory) -> None:
    closed = plain.close_run("closed", plain.open_run("closed", started_at=NOON).attempt, SUCCEEDED)
    taken = plain.open_run("another's", started_at=NOON)
    full = plain.open_run("full", attempt=MAX_ATTEMPT, started_at=NOON)
    others = 64 - 1
    opened = callers.together(*[opening(name) for name in names("open", others // 2)])
    for number, (bad, error, is_in_batch) in enumerate(BAD.values()):
        good = [closing(run.task_id, run.attempt) for run in opened]
        good += [opening(name) for name in names(f"new {number}", others - len(good))]
        found = callers.together(*good[:20], bad, *good[20:], batches=batches, waiting=others + is_in_batch)
        assert [len(tasks) for tasks in batches.tasks] == [1, others + is_in_batch]
        caught = found.pop(20)
        assert type(caught) is error, caught
        assert [run.is_active for run in found] == [False] * len(opened) + [True] * (others - len(opened))
        now = stored(plain)
        assert [now[run.task_id, run.attempt] for run in found] == found
        opened = found[len(opened) :][: len(opened)]
    assert [run for run in stored(plain).values() if run.source == "another"] == [taken, closed, full]


def test_rule_of_the_table_that_is_broken_in_the_middle_fails_its_caller_alone(
    callers: Callers, batches: Batches, plain: TaskRunHistory
) -> None:
    plain.open_run("full", attempt=MAX_ATTEMPT)
    opened = callers.together(*[opening(task) for task in names("open", 8)])
    good = [closing(run.task_id, run.attempt) for run in opened] + [opening(task) for task in names("new", 8)]
    found = callers.together(*good[:12], opening("full"), *good[12:], batches=batches)
    assert [len(tasks) for tasks in batches.tasks] == [1, 17]
    assert type(found.pop(12)) is AttemptConflictError
    assert [run.phase for run in found] == [SUCCEEDED] * 8 + [TaskPhase.RUNNING] * 8
    assert {run for run in stored(plain).values() if run.task_id != "full"} == set(found)


def test_calls_of_one_task_are_written_one_after_the_other(
    callers: Callers, batches: Batches, plain: TaskRunHistory
) -> None:
    works = [opening("one", started_at=NOON) for _ in range(64)] + [opening(task) for task in names("other", 10)]
    found = callers.together(*works, batches=batches)
    assert all(len(set(tasks)) == len(tasks) for tasks in batches.tasks)
    assert sum(map(len, batches.tasks)) == 1 + len(works)
    assert sorted(run.attempt for run in found[:64]) == list(range(1, 65))
    assert {run.attempt for run in found[64:]} == {1}
    assert set(stored(plain).values()) == set(found)


def test_what_a_caller_tells_in_order_is_done_in_order(
    callers: Callers, batches: Batches, plain: TaskRunHistory
) -> None:
    found = []
    for _ in range(3):
        opened = callers.together(*[opening(task, started_at=NOON) for task in names("task", 5)], batches=batches)
        ended = [closing(run.task_id, run.attempt, FAILED, error=f"{run.attempt}") for run in opened]
        found += callers.together(*ended, *[opening(task) for task in names("other", 5)], batches=batches)
    ends = [run for run in found if not run.is_active]
    assert [(run.attempt, run.error) for run in ends] == [(n, f"{n}") for n in (1, 2, 3) for _ in range(5)]
    now = stored(plain)
    assert [now[run.task_id, run.attempt] for run in ends] == ends


def test_lone_caller_sends_one_statement_for_each_call(callers: Callers) -> None:
    callers.call(opening("before"))
    sent: list[str] = []
    own = callers.history._group.writer._connections._engine

    @event.listens_for(own, "before_cursor_execute")
    def sending(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement.split(maxsplit=1)[0])

    run = callers.call(opening("job"))
    callers.call(closing("job", run.attempt))
    assert sent == ["INSERT", "UPDATE"]


def test_several_that_come_together_are_one_transaction(callers: Callers, batches: Batches, kind: str) -> None:
    opened = callers.together(*[opening(task) for task in names("task", 5)])
    sent: list[str] = []
    own = callers.history._group.writer._connections._engine

    @event.listens_for(own, "before_cursor_execute")
    def sending(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement.split(maxsplit=1)[0])

    works = [closing(run.task_id, run.attempt) for run in opened] + [opening(task) for task in names("new", 5)]
    callers.together(*works, batches=batches)
    assert sent == ["INSERT", *(["WITH"] if kind == "postgresql" else ["BEGIN", "UPDATE", "INSERT", "COMMIT"])]


@pytest.mark.parametrize("scene", [("sqlite", "threads"), ("sqlite", "tasks")], indirect=True, ids="-".join)
def test_no_more_wait_than_there_is_room_for(
    connect: Connect, plain: TaskRunHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (commit, aio.commit):
        monkeypatch.setattr(module, "MOST_WAITING", 5)
    callers, waiting = connect(), []
    write = commit.Writer.write

    def watched(writer: commit.Writer, calls: list[commit.Call]) -> None:
        waiting.append(len(callers.history._group._pending))
        write(writer, calls)
        waiting.append(len(callers.history._group._pending))

    monkeypatch.setattr(commit.Writer, "write", watched)
    found = callers.together(*[opening(task) for task in names("task", 200)])
    assert [run.attempt for run in found] == [1] * 200
    assert len(stored(plain)) == 200
    assert 1 <= max(waiting) <= 5


@pytest.mark.parametrize("scene", [("postgresql", "tasks"), ("mariadb", "threads")], indirect=True, ids="-".join)
def test_who_waits_for_a_lock_holds_up_the_others_for_a_moment_only(
    connect: Connect, batches: Batches, plain: TaskRunHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_HOLDUP", 0.1)
    plain.open_run("row")
    callers, is_held = connect(), threading.Event()

    def hold() -> None:
        with plain.begin(lock="number") as runs:
            runs.open_run("number")
            runs.close_run("row", 1, FAILED, error="same")
            is_held.set()
            until(lambda: len(stored(plain)) == 1 + 30, "the others are written")

    works = [opening(task) for task in names("other", 30)]
    held = [opening("number"), closing("row", 1, FAILED, error="same")]
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        assert is_held.wait(30)
        number, row, *_ = callers.together(*held, *works, batches=batches)
        holding.result()
    assert [len(tasks) for tasks in batches.tasks] == [1, 32]
    assert number.attempt == 2
    assert row == plain.get_run("row", 1)


def test_runs_that_are_not_active_here_are_closed_and_refined(
    callers: Callers, batches: Batches, plain: TaskRunHistory, database: str
) -> None:
    foreign = [plain.open_run(task, started_at=NOON) for task in names("foreign", 5)]
    dead = ["inferred 0", "inferred 1"]
    lose(database, *dead)
    assert {run.task_id for run in plain.recover()} == set(dead)
    works = [closing(run.task_id, 1, FAILED, error="1", finished_at=NOON) for run in foreign]
    works += [closing(task, 1) for task in dead]
    found = callers.together(*works, *[opening(task) for task in names("new", 5)], batches=batches)
    assert [len(tasks) for tasks in batches.tasks] == [1, 12]
    assert [(run.phase, run.recovered) for run in found[5:7]] == [(SUCCEEDED, False)] * 2
    assert found[:5] == [run.finish(FAILED, error="1", finished_at=NOON) for run in foreign]
    assert set(stored(plain).values()) == set(found)
    phases = [TaskPhase.EXHAUSTED, TaskPhase.TIMEOUT, FAILED, SUCCEEDED, TaskPhase.CANCELED]
    works = [
        closing(run.task_id, 1, phase, error=None, exit_code=9) for run, phase in zip(foreign, phases, strict=True)
    ]
    refined = callers.together(*works, batches=batches)
    assert [(run.phase, run.error, run.exit_code) for run in refined[:2]] == [(phase, "1", 9) for phase in phases[:2]]
    assert [type(error) for error in refined[2:]] == [RunClosedError] * 3


def test_later_start_closes_the_earlier_run_of_its_task(
    callers: Callers, batches: Batches, plain: TaskRunHistory
) -> None:
    first = callers.together(*[opening(task, started_at=NOON) for task in names("task", 5)], batches=batches)
    later = [opening(task, started_at=NOON + number % 2 * HOUR) for number, task in enumerate(names("task", 5))]
    second = callers.together(*later, *[opening(task) for task in names("other", 5)], batches=batches)
    assert [run.attempt for run in second[:5]] == [2] * 5
    lost = {run.task_id: run for run in stored(plain).values() if run.recovered}
    assert list(lost) == ["task 1", "task 3"]
    assert [(run.attempt, run.error, run.finished_at) for run in lost.values()] == [(1, SUPERSEDED, NOON + HOUR)] * 2
    for run in first:
        assert callers.call(closing(run.task_id, 1)).phase is SUCCEEDED


def test_unsuited_version_is_named_before_anything_is_done(
    callers: Callers, plain: TaskRunHistory, database: str
) -> None:
    run = plain.open_run("job")
    own = create_engine(database)
    with own.begin() as connection:
        version = connection.execute(text("SELECT version_num FROM taskruns_version")).scalar_one()
        connection.execute(text("UPDATE taskruns_version SET version_num = '2_0001'"))
    try:
        for work in (closing("job", 1), opening("job")):
            with pytest.raises(SchemaVersionError):
                callers.call(work)
        assert stored(plain) == {("job", 1): run}
    finally:
        with own.begin() as connection:
            connection.execute(text("UPDATE taskruns_version SET version_num = :version"), {"version": version})
        own.dispose()


def test_recorded_code_of_many_callers(callers: Callers, plain: TaskRunHistory) -> None:
    def recorded(number: int) -> Work:
        def work() -> None:
            if number % 2:
                raise TimeoutError(f"{number}")

        async def work_beside() -> None:
            work()

        async def beside(history: Any) -> None:
            await history.record(f"job {number % 4}")(work_beside)()

        return lambda history: (
            beside(history) if isinstance(callers, CALLERS["tasks"]) else history.record(f"job {number % 4}")(work)()
        )

    found = callers.together(*map(recorded, range(16)))
    assert [type(error) for error in found] == [type(None), TimeoutError] * 8
    runs = stored(plain)
    assert list(runs) == [(f"job {task}", attempt) for task in range(4) for attempt in range(1, 5)]
    assert {(key[0], run.phase) for key, run in runs.items()} == {
        ("job 0", SUCCEEDED),
        ("job 1", TaskPhase.TIMEOUT),
        ("job 2", SUCCEEDED),
        ("job 3", TaskPhase.TIMEOUT),
    }


def test_text_of_a_batch_has_a_limit(mariadb: str) -> None:
    with TaskRunHistory.connect(mariadb, source="here", group_commit=True) as history:
        group: Any = history._group
        error = "\x01" * (60 * 1024)  # six bytes each in JSON, of which the server takes 16 MiB at once
        tasks = [f"job {number}" for number in range(100)]
        for task in tasks:
            history.open_run(task)
        outcome = Outcome.of(TaskPhase.FAILED, error=error, exit_code=1, finished_at=None)
        calls = [Call(task, attempt=1, outcome=outcome) for task in tasks]
        group.writer.write(calls)
        written = [call for call in calls if call.run is not None]
        assert 10 < len(written) < 100
        assert [call.error for call in calls] == [None] * 100  # the others are written each by itself
        assert history.get_run(written[0].task_id, 1) == written[0].run
