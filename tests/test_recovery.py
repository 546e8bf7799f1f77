"""Active runs of the dead are closed, all others never: judged by process and by heartbeat."""

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import update
from watchers import (
    ELSEWHERE,
    FAR,
    GONE,
    HERE,
    add_runs,
    age,
    lose,
    register,
    register_all,
    sleeping,
    stored,
    write,
    zombie,
)

from taskruns import TaskPhase, TaskRun, TaskRunHistory, engine, liveness, recovery
from taskruns.liveness import Process
from taskruns.schema import task_runs
from taskruns.times import rfc3339

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes cannot be told apart")


def test_ended_processes_of_this_host_are_gone_and_others_are_judged_by_their_silence(
    history: TaskRunHistory, database: str
) -> None:
    with sleeping() as living, sleeping(stopped=True) as stopped, zombie() as ended:
        cases: dict[str, tuple[Process, float, bool]] = {
            "gone": (GONE, 0, True),
            "a zombie": (ended, 0, True),
            "its number is another process's now": (replace(living, started=(living.started or 0) - 1), 0, True),
            "this process": (HERE, FAR, False),
            "living": (living, FAR, False),
            "stopped": (stopped, FAR, False),
            "living, with another name of the host": (replace(living, host="renamed"), FAR, False),
            "gone, with another name of the host": (replace(GONE, host="renamed"), 0, True),
        }
        strangers: dict[str, dict[str, Any]] = {
            "another boot": {"boot_id": ELSEWHERE.boot_id},
            "another container": {"pid_namespace": 1},
            "another host": {"boot_id": ELSEWHERE.boot_id, "pid_namespace": 1, "host": "elsewhere"},
            "no boot id": {"boot_id": None},
            "no namespace": {"pid_namespace": None},
            "neither": {"boot_id": None, "pid_namespace": None, "started": None},
            "no start": {"started": None},
        }
        for name, place in strangers.items():
            for number, one in (("gone", GONE), ("living", living)):
                cases[f"{name}, {number}, heard of"] = replace(one, **place), 30, False
                cases[f"{name}, {number}, silent"] = replace(one, **place), 90, True
        register_all(database, [(one, silent, [name]) for name, (one, silent, _) in cases.items()])
        expected = {name for name, (_, _, is_dead) in cases.items() if is_dead}
        assert {run.task_id for run in history.recover(dry_run=True)} == expected
        assert {run.task_id for run in history.recover()} == expected
    assert {run.task_id for run in history.active_runs()} == cases.keys() - expected
    assert {run.task_id for run in history.tasks() if run.recovered} == expected


@pytest.mark.parametrize(("stale_after", "expected"), [(None, set()), (1000.0, set()), (1.0, {"job"}), (0.0, {"job"})])
def test_limit_of_silence_is_the_callers(
    history: TaskRunHistory, database: str, stale_after: float | None, expected: set[str]
) -> None:
    lose(database, "job", by=ELSEWHERE, silent=500)
    assert {run.task_id for run in history.recover(stale_after=stale_after)} == expected


def test_process_that_cannot_be_seen_is_judged_by_its_silence(
    history: TaskRunHistory, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(database, "hidden, heard of", by=replace(HERE, started=1), silent=30)
    lose(database, "hidden, silent", by=replace(HERE, started=1), silent=90)
    monkeypatch.setattr(liveness, "_state", lambda _pid: None)
    assert [run.task_id for run in history.recover()] == ["hidden, silent"]


def test_living_supervisor_that_was_idle_for_long_is_not_dead(history: TaskRunHistory, database: str) -> None:
    run = history.open_run("job")
    age(database, FAR, id=run.supervisor_id)
    assert history.recover() == []
    assert history.active_runs() == [run]


def test_what_is_known_of_a_recovered_run(history: TaskRunHistory, database: str) -> None:
    number = register(database, replace(GONE, host="web-1"), silent=100)
    add_runs(database, number, "started before", ago=1000)
    add_runs(database, number, "started after", ago=50)
    (supervisor,) = history.supervisors()
    last_seen = supervisor.heartbeat_at
    before = {run.task_id: run for run in history.active_runs()}
    closed = history.recover()
    error = f"run outcome not observed (supervisor web-1:{GONE.pid} last seen {rfc3339(last_seen)})"
    lost: dict[str, Any] = {"phase": TaskPhase.FAILED, "error": error, "recovered": True}
    assert closed == [
        replace(before["started after"], **lost, finished_at=before["started after"].started_at),
        replace(before["started before"], **lost, finished_at=last_seen),
    ]
    assert closed == history.tasks()


def test_finished_runs_are_never_touched(history: TaskRunHistory, database: str) -> None:
    number = lose(database, "lost")
    add_runs(database, number, "finished", attempts=range(1, 6))
    for attempt, phase in enumerate(list(TaskPhase)[2:], 1):
        history.close_run("finished", attempt, phase, exit_code=3)
    before = list(history.iter_runs("finished"))
    assert len(before) == 5
    assert [run.task_id for run in history.recover(stale_after=0.0, unsupervised_after=0.0)] == ["lost"]
    assert list(history.iter_runs("finished")) == before


def test_runs_without_a_supervisor_are_closed_by_age_only(history: TaskRunHistory, database: str) -> None:
    add_runs(database, None, "by nobody", ago=100)
    add_runs(database, 987654321, "by somebody unknown", ago=100)
    add_runs(database, None, "young", ago=30)
    add_runs(database, register(database, HERE), "watched", ago=100)
    before = {run.task_id: run for run in history.active_runs()}
    assert history.recover(stale_after=0.0) == []
    closed = history.recover(unsupervised_after=60.0)
    assert closed == [
        replace(
            before[task],
            phase=TaskPhase.FAILED,
            error="run outcome not observed (no supervisor)",
            finished_at=before[task].started_at,
            recovered=True,
        )
        for task in ("by nobody", "by somebody unknown")
    ]
    assert {run.task_id for run in history.active_runs()} == {"young", "watched"}


def test_dry_run_changes_nothing(history: TaskRunHistory, database: str) -> None:
    lose(database, "a", "b")
    lose(database, by=ELSEWHERE, silent=FAR)
    add_runs(database, None, "c")
    before = stored(database)
    would_be = history.recover(unsupervised_after=1.0, dry_run=True)
    assert [run.task_id for run in would_be] == ["a", "b", "c"]
    assert stored(database) == before
    assert history.recover(unsupervised_after=1.0) == would_be
    assert stored(database) != before
    assert history.recover(unsupervised_after=1.0) == []


def test_rows_of_the_dead_are_removed_and_of_the_living_kept(history: TaskRunHistory, database: str) -> None:
    kept = {register(database, HERE, silent=FAR), register(database, ELSEWHERE, silent=1)}
    lose(database, "job")
    lose(database)
    lose(database, by=ELSEWHERE, silent=FAR)
    history.recover()
    assert {found.id for found in history.supervisors()} == kept
    assert history.active_runs() == []


def test_many_are_recovered_at_once(history: TaskRunHistory, database: str) -> None:
    runs = [
        TaskRun.starting(f"job {number:04}", 1, started_at=datetime(2026, 1, 1, tzinfo=UTC)) for number in range(1200)
    ]
    history.add_runs(runs)
    write(database, update(task_runs).values(supervisor_id=lose(database)))
    assert [run.task_id for run in history.recover()] == [run.task_id for run in runs]
    assert (history.active_runs(), history.supervisors()) == ([], [])


def test_recovery_in_a_transaction_is_undone_with_it(history: TaskRunHistory, database: str) -> None:
    lose(database, "job")
    with suppress(ZeroDivisionError), history.begin(brief=True) as runs:
        assert [run.task_id for run in runs.recover()] == ["job"]
        assert runs.active_runs() == []
        raise ZeroDivisionError
    assert [run.task_id for run in history.active_runs()] == ["job"]
    with history.begin(brief=True) as runs:
        runs.recover()
    assert history.active_runs() == []


@contextmanager
def found_but_not_closed(url: str) -> Iterator[Callable[[], list[TaskRun]]]:
    """Find what is lost, seen from here; what is yielded closes it."""
    own = engine.create(url)
    with own.connect() as connection:
        losses = recovery.find_losses(connection, HERE, unsupervised_after=60.0)
        connection.commit()
        assert losses

        def close() -> list[TaskRun]:
            with engine.transaction(connection):
                return recovery.close(connection, losses)

        yield close
    own.dispose()


@pytest.mark.parametrize("supervised", [True, False])
def test_run_that_ends_meanwhile_is_left_alone(history: TaskRunHistory, database: str, supervised: bool) -> None:
    if supervised:
        lose(database, "job")
    else:
        add_runs(database, None, "job")
    with found_but_not_closed(database) as close:
        run = history.close_run("job", 1, TaskPhase.SUCCEEDED)
        assert close() == []
    assert history.get_run("job", 1) == run


def test_run_whose_supervisor_beats_meanwhile_is_left_alone(history: TaskRunHistory, database: str) -> None:
    number = lose(database, "job", by=ELSEWHERE, silent=FAR)
    with found_but_not_closed(database) as close:
        age(database, 0, id=number)
        assert close() == []
    assert [run.task_id for run in history.active_runs()] == ["job"]


def test_real_outcome_replaces_the_inferred_one(history: TaskRunHistory, database: str) -> None:
    lose(database, "job")
    (lost,) = history.recover()
    real = history.close_run("job", 1, TaskPhase.SUCCEEDED, exit_code=0)
    assert (real.phase, real.error, real.exit_code, real.recovered) == ("succeeded", None, 0, False)
    assert real.finished_at is not None
    assert lost.finished_at is not None
    assert real.finished_at > lost.finished_at
    assert history.get_run("job", 1) == real
    assert history.recover() == []


def test_two_that_recover_share_the_runs(database: str) -> None:
    lose(database, *(f"job {number:02}" for number in range(40)))
    together = threading.Barrier(2)
    closed: list[str] = []

    def recover() -> None:
        with TaskRunHistory.connect(database) as history:
            history.check_version()
            together.wait(30)
            closed.extend(run.task_id for run in history.recover())

    threads = [threading.Thread(target=recover) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(closed) == [f"job {number:02}" for number in range(40)]


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.soak)])
def test_real_close_wins_every_race_against_recovery(database: str, count: int) -> None:
    together = threading.Barrier(2)
    recovered: list[int] = []
    failures: list[BaseException] = []
    number = lose(database)
    add_runs(database, number, "job", attempts=range(1, count + 1))

    def recover() -> None:
        with TaskRunHistory.connect(database) as history, history._engine.connect() as connection:
            for attempt in range(1, count + 1):
                run = history.get_run("job", attempt)
                assert run is not None
                supervisor = next(found for found in history.supervisors() if found.id == number)
                loss = recovery.Loss(recovery.ended(run, GONE, supervisor.heartbeat_at), supervisor)
                together.wait(60)
                with engine.transaction(connection):
                    recovered.extend(run.attempt for run in recovery.close(connection, [loss]))
                together.wait(60)

    def close() -> None:
        with TaskRunHistory.connect(database) as history:
            history.check_version()
            for attempt in range(1, count + 1):
                together.wait(60)
                closed = history.close_run("job", attempt, TaskPhase.SUCCEEDED, exit_code=0)
                assert (closed.phase, closed.recovered) == ("succeeded", False)
                together.wait(60)

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (told below)
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (recover, close)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert failures == []
    with TaskRunHistory.connect(database) as history:
        ends = {(run.phase, run.error, run.exit_code, run.recovered) for run in history.iter_runs("job")}
    print(f"{count} races: recovery came first in {len(recovered)}")
    assert ends == {("succeeded", None, 0, False)}


def test_new_supervisor_closes_what_the_dead_of_its_host_have_left(history: TaskRunHistory, database: str) -> None:
    number = lose(database, "job", "lost")
    lose(database, "of another host", by=ELSEWHERE, silent=FAR)
    run = history.open_run("job")
    assert run.attempt == 2
    assert {run.task_id for run in history.tasks() if run.recovered} == {"lost"}
    assert [found.recovered for found in history.iter_runs("job")] == [False, True]
    assert {run.task_id for run in history.active_runs()} == {"job", "of another host"}
    assert number not in {found.id for found in history.supervisors()}
    assert len(history.supervisors()) == 2


def test_host_is_named_as_the_system_names_it() -> None:
    assert HERE.host == socket.gethostname()
