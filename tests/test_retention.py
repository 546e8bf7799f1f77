"""What a policy deletes and what it never does, by passes and by slices, while others do the same."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from histories import Histories
from hypothesis import example, given, settings, strategies as st
from sqlalchemy import make_url
from writers import Writer, race

from taskruns import EventRecorder, Retention, TaskPhase, TaskRun, TaskRunHistory, pruning
from taskruns.retention import EMBEDDED, is_turn

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
SUCCEEDED, FAILED, RUNNING = TaskPhase.SUCCEEDED, TaskPhase.FAILED, TaskPhase.RUNNING
SECRET = "hunter2-correct-horse-battery-staple"


def ended(task: str, attempt: int, days: float, phase: TaskPhase = SUCCEEDED, error: str | None = None) -> TaskRun:
    """A run that ended so many days ago."""
    end = NOW - days * DAY
    return TaskRun(task, attempt, phase, end - timedelta(hours=1), end, error=error)


def active(task: str, attempt: int, days: float = 1000) -> TaskRun:
    return TaskRun(task, attempt, RUNNING, NOW - days * DAY)


def keys(runs: Iterable[TaskRun]) -> list[tuple[str, int]]:
    return sorted((run.task_id, run.attempt) for run in runs)


def kept(runs: Sequence[TaskRun], retention: Retention) -> list[TaskRun]:
    """The model: the rules, one after the other."""
    stay = []
    for task in {run.task_id for run in runs}:
        own = sorted((run for run in runs if run.task_id == task), key=lambda run: -run.attempt)
        ends = [run.finished_at for run in own if run.finished_at is not None]
        idle = retention.forget_idle
        if idle is not None and len(ends) == len(own) and all(end < NOW - idle for end in ends):
            continue
        success = next((run for run in own if run.phase is SUCCEEDED), None)
        for place, run in enumerate(own):
            age = retention.succeeded if run.phase is SUCCEEDED else retention.others
            is_old = age is not None and run.finished_at is not None and run.finished_at < NOW - age
            if not is_old or place < max(retention.keep, 1) or run is success:
                stay.append(run)
    return stay


POLICY = Retention(succeeded=90 * DAY, others=365 * DAY, keep=2)
IDLE = replace(POLICY, forget_idle=400 * DAY)
TABLE: dict[str, tuple[Retention, list[TaskRun], list[int]]] = {
    "young runs stay": (POLICY, [ended("t", n, 89) for n in range(1, 6)], [1, 2, 3, 4, 5]),
    "old ones go but the newest": (POLICY, [ended("t", n, 91) for n in range(1, 6)], [4, 5]),
    "others have an age of their own": (
        POLICY,
        [ended("t", 1, 366, FAILED), ended("t", 2, 364, FAILED), *(ended("t", n, 1) for n in (3, 4))],
        [2, 3, 4],
    ),
    "canceled, timeout and exhausted are others": (
        POLICY,
        [
            *(
                ended("t", n, 300, phase)
                for n, phase in enumerate([TaskPhase.CANCELED, TaskPhase.TIMEOUT, TaskPhase.EXHAUSTED], 1)
            ),
            *(ended("t", n, 1) for n in (4, 5)),
        ],
        [1, 2, 3, 4, 5],
    ),
    "the latest success stays": (
        POLICY,
        [ended("t", 1, 900), ended("t", 2, 800), *(ended("t", n, 700, FAILED) for n in range(3, 7))],
        [2, 5, 6],
    ),
    "the newest are so by attempt": (
        POLICY,
        [ended("t", 1, 100), ended("t", 2, 100), ended("t", 3, 900), ended("t", 4, 800)],
        [3, 4],
    ),
    "without any kept the latest stays": (
        replace(POLICY, keep=0),
        [ended("t", n, 900, FAILED) for n in (1, 2, 3)],
        [3],
    ),
    "active runs stay and count": (
        POLICY,
        [active("t", 1), ended("t", 2, 900, FAILED), ended("t", 3, 900, FAILED), active("t", 4)],
        [1, 3, 4],
    ),
    "never is never": (
        Retention(succeeded=None, others=None, keep=1),
        [ended("t", n, 9000) for n in (1, 2)],
        [1, 2],
    ),
    "an age that reaches before all times is never": (
        Retention(succeeded=timedelta.max, others=None, keep=1, forget_idle=timedelta.max),
        [ended("t", n, 9000) for n in (1, 2)],
        [1, 2],
    ),
    "an idle task goes": (IDLE, [ended("t", 1, 401), ended("t", 2, 500, FAILED)], []),
    "one that is active is not idle": (IDLE, [active("t", 1), ended("t", 2, 500), ended("t", 3, 500)], [1, 2, 3]),
    "one that ended lately is not idle": (IDLE, [ended("t", 1, 399, FAILED), ended("t", 2, 500)], [1, 2]),
}


@pytest.mark.parametrize("rule", TABLE)
def test_exactly_these_runs_survive(history: TaskRunHistory, rule: str) -> None:
    retention, runs, survivors = TABLE[rule]
    others = [replace(run, task_id=task) for run in runs for task in ("s", "u")]
    history.add_runs([*runs, *others])
    expected = len(runs) - len(survivors)
    assert history.prune(retention, dry_run=True) == 3 * expected
    assert history.prune(retention, task="t") == expected
    assert keys(history.all_runs()) == sorted([("t", attempt) for attempt in survivors] + keys(others))
    assert history.prune(retention) == 2 * expected
    assert keys(history.all_runs()) == [(task, attempt) for task in "stu" for attempt in survivors]
    assert history.prune(retention) == 0


def test_numbers_go_on(history: TaskRunHistory) -> None:
    history.add_runs([ended("t", n, 500, FAILED) for n in range(1, 4)])
    assert history.prune(Retention(keep=0)) == 2
    assert history.open_run("t").attempt == 4
    history.add_runs([ended("gone", 7, 500)])
    assert history.prune(Retention(forget_idle=400 * DAY)) == 1
    assert history.open_run("gone").attempt == 1


phases = st.sampled_from([SUCCEEDED, SUCCEEDED, FAILED, RUNNING])
days = st.sampled_from([1, 50, 150, 300, 450])
ages = st.one_of(st.none(), st.sampled_from([timedelta(0), 100 * DAY, 200 * DAY, 400 * DAY]))
policies = st.builds(Retention, succeeded=ages, others=ages, keep=st.integers(0, 4), forget_idle=ages)
tables = st.dictionaries(
    st.tuples(st.sampled_from(["a", "b", "b:x", "c*"]), st.integers(1, 30)), st.tuples(phases, days), max_size=40
)


def runs_of(table: dict[tuple[str, int], tuple[TaskPhase, float]]) -> list[TaskRun]:
    return [
        active(*key, days=since) if phase is RUNNING else ended(*key, since, phase)
        for key, (phase, since) in table.items()
    ]


@pytest.mark.parametrize("batch", [1, 3, 500])
@settings(max_examples=15)
@given(tables, policies, st.sampled_from([None, "b*", "b", "c[*]", "c*", "z"]))
@example({("a", n): (SUCCEEDED, 450) for n in range(1, 8)}, IDLE, None)
@example({("b", 1): (SUCCEEDED, 450), ("c*", 9): (FAILED, 450), ("c*", 8): (FAILED, 450)}, IDLE, None)
def test_a_pass_keeps_what_the_model_keeps(
    history: TaskRunHistory, batch: int, table: Any, retention: Retention, task: str | None
) -> None:
    for name in {name for name, _ in table} | {run.task_id for run in history.tasks()}:
        for run in history.active_runs(name):
            history.close_run(run.task_id, run.attempt, FAILED)
        history.forget(name)
    runs = runs_of(table)
    history.add_runs(runs)
    wanted = [run for run in runs if task is None or fnmatchcase(run.task_id, task)]
    expected = [run for run in runs if run not in wanted] + kept(wanted, retention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "BATCH", batch)
        assert history.prune(retention, task=task, dry_run=True) == len(runs) - len(expected)
        assert history.prune(retention, task=task) == len(runs) - len(expected)
    assert keys(history.all_runs()) == keys(expected)


@settings(max_examples=25)
@given(tables, policies)
def test_a_slice_deletes_nothing_that_a_pass_would_keep(sqlite: str, table: Any, retention: Retention) -> None:
    with TaskRunHistory.connect(sqlite, retention=retention) as history:
        for run in history.active_runs():
            history.close_run(run.task_id, run.attempt, FAILED)
        for run in history.tasks():
            history.forget(run.task_id)
        runs = runs_of(table)
        history.add_runs(runs)
        history.tidy("a")
        assert set(keys(history.all_runs())) >= set(keys(kept(runs, retention)))


def test_slices_come_to_what_a_pass_keeps(database: str, histories: Histories, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "BATCH", 50)
    monkeypatch.setattr(pruning, "SLICE", 25)
    history = histories.connect(database, retention=replace(EMBEDDED, keep=3))
    assert history.retention is not None
    runs = [
        *(ended("often", n, 700.1 - 5 * n, SUCCEEDED if n % 3 else FAILED) for n in range(1, 130)),
        *(ended(f"once {n}", 1, 800.1 - 10 * n) for n in range(70)),
        *(ended("seldom", n, 1000.1 - 50 * n, FAILED if n > 4 else SUCCEEDED) for n in range(1, 19)),
        active("stuck", 1),
    ]
    history.add_runs(runs)
    for _ in range(40):
        history.tidy("often")
    assert keys(history.all_runs()) == keys(kept(runs, history.retention))


def test_old_runs_that_stay_do_not_hide_those_that_go(
    database: str, histories: Histories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "BATCH", 20)
    monkeypatch.setattr(pruning, "SLICE", 10)
    history = histories.connect(database, retention=EMBEDDED)
    assert history.retention is not None
    runs = [
        *(ended(f"seldom {n}", 1, 900 + n) for n in range(30)),
        *(ended(f"seldom {n}", 2, 1) for n in range(30)),
        *(ended(f"once {n}", 1, 700 - 7 * n) for n in range(30)),
    ]
    history.add_runs(runs)
    left = keys(kept(runs, history.retention))
    for _ in range(200):
        history.tidy("seldom 1")
        if keys(history.all_runs()) == left:
            break
    assert keys(history.all_runs()) == left


def test_many_turns_are_one_slice_that_is_larger(database: str, histories: Histories) -> None:
    history = histories.connect(database, retention=EMBEDDED)
    history.add_runs([ended(f"t {n % 3}", n // 3 + 1, 600) for n in range(1500)])
    history.tidy(*["t 0"] * 3, "t 1", "t 2")
    left = len(list(history.all_runs()))
    assert 1500 - 5 * pruning.SLICE <= left < 1500 - 2 * pruning.SLICE
    history.tidy()
    assert len(list(history.all_runs())) == left


def test_a_slice_is_bounded(database: str, histories: Histories) -> None:
    history = histories.connect(database, retention=EMBEDDED)
    history.add_runs([ended("often", n, 600) for n in range(1, 600)] + [ended(f"once {n}", 1, 800) for n in range(600)])
    before = len(list(history.all_runs()))
    history.tidy("often")
    assert 0 < before - len(list(history.all_runs())) <= 2 * pruning.SLICE


def test_a_close_tidies_when_it_is_its_turn(database: str, histories: Histories) -> None:
    history = histories.connect(database, retention=Retention(keep=1))
    history.add_runs([ended("t", n, 500) for n in range(1, 31)] + [ended("u", n, 500) for n in (1, 2)])
    for attempt in (31, 32):
        assert len(list(history.iter_runs("t"))) == 30 + attempt - 31
        history.close_run("t", history.open_run("t").attempt, SUCCEEDED)
    assert keys(history.all_runs()) == [("t", 31), ("t", 32), ("u", 2)]


def test_a_history_without_a_policy_deletes_nothing(database: str, histories: Histories) -> None:
    history = histories.connect(database)
    history.add_runs([ended("t", n, 5000) for n in range(1, 32)])
    history.close_run("t", history.open_run("t").attempt, SUCCEEDED)
    history.tidy("t")
    assert len(list(history.all_runs())) == 32


def test_a_close_does_not_fail_with_its_tidying(
    database: str, histories: Histories, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError("the disk is full")

    monkeypatch.setattr(pruning, "tidy", fail)
    history = histories.connect(database, retention=Retention())
    with caplog.at_level("DEBUG", "taskruns"):
        assert history.close_run("t", history.open_run("t", attempt=32).attempt, SUCCEEDED).phase is SUCCEEDED
    assert [record.levelname for record in caplog.records if "not deleted at present" in record.message] == ["DEBUG"]


def test_first_runs_have_their_turn_now_and_then() -> None:
    turns = sum(is_turn(1) for _ in range(3200))
    assert 20 < turns < 250
    assert [attempt for attempt in range(2, 100) if is_turn(attempt)] == [32, 64, 96]


def events(task: str, count: int) -> list[dict[str, int | str]]:
    """So many runs, each started and finished."""
    return [
        {"kind": kind, "task": task, "attempt": 1, "at": (NOW + timedelta(seconds=n)).isoformat()}
        | ({"outcomeKind": "completed"} if n % 2 else {})
        for n in range(2 * count)
        for kind in (("TaskStarting", "TaskFinished")[n % 2],)
    ]


def test_events_tidy_once_for_so_many_ends(sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tidied = []
    monkeypatch.setattr(TaskRunHistory, "tidy", lambda _history, *task_ids: tidied.extend(task_ids))

    with TaskRunHistory.connect(sqlite, retention=EMBEDDED) as history:
        recorder = EventRecorder(history)
        recorder.record_all(events("a", 64))
        assert tidied == ["a", "a"]
        recorder.record_all(events("b", 480))
        assert tidied == ["a", "a", *["b"] * 15]
        recorder.record_all(events("b", 2000))
        assert len(tidied) == 17 + 16
        history.retention = None
        recorder.record_all(events("c", 64))
        assert len(tidied) == 17 + 16


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"succeeded": 90}, TypeError),
        ({"others": -DAY}, ValueError),
        ({"keep": -1}, ValueError),
        ({"keep": True}, TypeError),
        ({"keep": "10"}, TypeError),
        ({"forget_idle": -DAY}, ValueError),
    ],
)
def test_a_policy_checks_its_values(values: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(values))):
        Retention(**values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("off", None),
        (" off ", None),
        ("succeeded=30d", replace(EMBEDDED, succeeded=30 * DAY)),
        ("succeeded=30d, others=365d, keep=5, forget-idle=400d", replace(EMBEDDED, succeeded=30 * DAY, keep=5)),
        ("others=never keep=0", replace(EMBEDDED, others=None, keep=0)),
        ("forget-idle=never,succeeded=1.5h,", replace(EMBEDDED, forget_idle=None, succeeded=timedelta(hours=1.5))),
    ],
)
def test_a_policy_is_read(text: str, expected: Retention | None) -> None:
    assert Retention.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a retention is off, or values such as"),
        ("on", "not 'on'"),
        ("90d", "not '90d'"),
        ("success=30d", "no 'success' in a retention, only succeeded, others, keep, forget-idle"),
        ("succeeded=soon", "succeeded: 'soon' is not a duration"),
        ("succeeded = 30d", "not 'succeeded = 30d'"),
        ("keep=never", "keep is a number, not 'never'"),
        ("keep=-1", "keep is a number"),
        ("keep=99999999999", "keep must be"),
        ("keep=1 keep=2", "keep is there twice"),
        ("others=40000d", "longer than a century"),
    ],
)
def test_a_policy_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Retention.parse(text)
    assert said in str(caught.value)


def test_forget_deletes_what_has_ended(history: TaskRunHistory) -> None:
    history.add_runs([*(ended("t", n, 1) for n in range(1, 8)), active("t", 8), ended("u", 1, 1)])
    assert history.forget("t", 3) == 1
    assert history.forget("t", 3) == 0
    assert history.forget("t", 8) == 0
    assert history.forget("t") == 6
    assert keys(history.all_runs()) == [("t", 8), ("u", 1)]
    assert history.forget("nothing") == 0


def test_forget_only_errors(history: TaskRunHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "BATCH", 2)
    runs = [ended("t", n, 1, FAILED, f"{SECRET} {n}") for n in range(1, 6)] + [ended("t", 6, 1, FAILED), active("t", 7)]
    history.add_runs(runs)
    assert history.forget("t", 2, error_only=True) == 1
    assert history.forget("t", error_only=True) == 4
    assert history.forget("t", error_only=True) == 0
    stored = list(history.all_runs("t"))
    assert [run.error for run in stored] == ["[removed]"] * 5 + [None] * 2
    assert [replace(run, error=None) for run in stored] == [replace(run, error=None) for run in runs]


@pytest.mark.parametrize("error_only", [False, True])
@pytest.mark.parametrize("length", [10, 3000, 60_000])
def test_a_forgotten_secret_is_not_in_the_files(
    sqlite: str, histories: Histories, length: int, error_only: bool
) -> None:
    path = Path(str(make_url(sqlite).database))
    history = histories.connect(sqlite)

    def bytes_on_disk() -> bytes:
        return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))

    for number in range(20):
        error = SECRET + "x" * length if number == 10 else "harmless"
        history.close_run("t", history.open_run("t").attempt, FAILED, error=error)
    assert SECRET.encode() in bytes_on_disk()
    history.forget("t", 11, error_only=error_only)
    assert SECRET.encode() not in bytes_on_disk()


def test_a_log_in_use_is_told(sqlite: str, caplog: pytest.LogCaptureFixture) -> None:
    with TaskRunHistory.connect(sqlite, lock_timeout=0.05) as history, TaskRunHistory.connect(sqlite) as other:
        history.add_runs([ended("t", 1, 1)])
        reader = other._engine.connect()
        reader.exec_driver_sql("BEGIN")
        reader.exec_driver_sql("SELECT * FROM task_runs").all()
        assert history.forget("t") == 1
        reader.exec_driver_sql("ROLLBACK")
        reader.close()
    assert "still holds what has been deleted" in caplog.text


def test_compact_gives_space_back(history: TaskRunHistory, database: str) -> None:
    history.add_runs([ended("t", n, 500, FAILED, "e" * 1000) for n in range(1, 400)])
    path = Path(str(make_url(database).database)) if database.startswith("sqlite") else None
    assert history.prune(Retention(keep=1)) == 398
    history.compact()
    if path is not None:
        assert path.stat().st_size < 150_000
    assert keys(history.all_runs()) == [("t", 399)]


def fill(url: str, tasks: int, count: int) -> list[TaskRun]:
    runs = [
        ended(f"task {n % tasks}", n // tasks + 1, 730.1 * (1 - n / count), FAILED if n % 7 == 0 else SUCCEEDED)
        for n in range(count)
    ]
    with TaskRunHistory.connect(url) as history:
        history.add_runs(runs)
    return runs


def test_passes_at_once_while_others_write(database: str) -> None:
    runs = fill(database, 20, 4000)
    expected = kept(runs, EMBEDDED)
    first, second, written, _ = race(
        database, ("prune",), ("prune",), ("open and close", 20, 30, 0), ("open and close", 20, 30, 5)
    )
    assert first[-1] + second[-1] == len(runs) - len(expected)
    assert written == [30]
    with TaskRunHistory.connect(database) as history:
        stored = keys(history.all_runs())
    assert len(stored) == len(expected) + 60
    assert set(keys(expected)) <= set(stored)


def test_a_pass_that_is_killed_is_started_again(database: str) -> None:
    runs = fill(database, 5, 3000)
    with Writer("prune", database) as writer:
        writer.wait_until_ready()
        writer.start()
        assert writer.process.stdout is not None
        writer.process.stdout.readline()  # a step is done
        writer.kill()
    with TaskRunHistory.connect(database) as history:
        left = len(list(history.all_runs()))
        assert history.prune(EMBEDDED) == left - len(kept(runs, EMBEDDED))
        assert keys(history.all_runs()) == keys(kept(runs, EMBEDDED))
