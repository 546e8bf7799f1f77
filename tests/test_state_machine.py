"""Random sequences of calls against a plain model in memory."""

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from histories import in_use
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from servers import KINDS, Databases, available
from sqlalchemy import insert

from taskruns import (
    AttemptConflictError,
    RunClosedError,
    RunExistsError,
    RunNotFoundError,
    TaskPhase,
    TaskRun,
    TaskRunHistory,
)
from taskruns.commit import Writer
from taskruns.model import MAX_ATTEMPT, SUPERSEDED, clean_error
from taskruns.schema import task_runs

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
RANKS = {TaskPhase.FAILED: 1, TaskPhase.EXHAUSTED: 2, TaskPhase.TIMEOUT: 3}

TASKS = st.sampled_from(["a", "A", "á", "b b"])
ATTEMPTS = st.one_of(st.integers(1, 6), st.just(MAX_ATTEMPT))
TIMES = st.integers(-3, 3).map(lambda seconds: NOON + timedelta(seconds=seconds, microseconds=seconds))
PHASES = st.sampled_from([phase for phase in TaskPhase if phase.is_terminal])
ERRORS = st.sampled_from([None, "", "boom", "x\x00y", "://u:p@h", "é" * 40_000])
CODES = st.sampled_from([None, 0, 1, -(2**31), 2**31 - 1])
SOME_PHASES = st.none() | st.sets(st.sampled_from(TaskPhase), max_size=3)


class Model:
    """What section 2 of the design says, as plainly as can be."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, int], TaskRun] = {}

    def of(self, task: str) -> list[TaskRun]:
        return sorted((run for run in self.runs.values() if run.task_id == task), key=lambda run: -run.attempt)

    def open(self, task: str, attempt: int | None, started_at: datetime) -> TaskRun | type[Exception]:
        if attempt is None:
            attempt = max((run.attempt for run in self.of(task)), default=0) + 1
            if attempt > MAX_ATTEMPT:
                return AttemptConflictError
        elif (task, attempt) in self.runs:
            stored = self.runs[task, attempt]
            return stored if stored.started_at == started_at else RunExistsError
        run = TaskRun(task, attempt, TaskPhase.RUNNING, started_at, source="here")
        for earlier in self.of(task):
            if earlier.is_active and earlier.started_at < started_at:
                lost = earlier.finish(TaskPhase.FAILED, error=SUPERSEDED, finished_at=started_at)
                self.runs[task, earlier.attempt] = replace(lost, recovered=True)
        self.runs[task, attempt] = run
        return run

    def close(
        self, task: str, attempt: int, phase: TaskPhase, error: str | None, code: int | None, end: datetime
    ) -> TaskRun | type[Exception]:
        run = self.runs.get((task, attempt))
        if run is None:
            return RunNotFoundError
        error = clean_error(error)
        if run.is_active or run.recovered:
            end = max(end, run.started_at)
            run = replace(run, phase=phase, finished_at=end, error=error, exit_code=code, recovered=False)
        elif (run.phase, run.error, run.exit_code) != (phase, error, code):
            old, new = RANKS.get(run.phase, 0), RANKS.get(phase, 0)
            if not old or not new or old == new:
                return RunClosedError
            if new > old and phase is TaskPhase.TIMEOUT:
                run = replace(
                    run, phase=phase, error=error or run.error, exit_code=run.exit_code if code is None else code
                )
            elif new > old:
                code = code if run.exit_code is None else run.exit_code
                run = replace(run, phase=phase, error=run.error or error, exit_code=code)
        self.runs[task, attempt] = run
        return run


class Histories(RuleBasedStateMachine):
    databases: Databases
    kind: str
    group_commit = False

    @initialize()
    def connect(self) -> None:
        url = self.databases.migrated(self.kind)
        self.history = TaskRunHistory.connect(url, source="here", group_commit=self.group_commit)
        self.model = Model()

    def teardown(self) -> None:
        if hasattr(self, "history"):
            assert in_use(self.history) == 0
            self.history.dispose()

    def agree(self, expected: TaskRun | type[Exception], call: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(expected, TaskRun):
            assert call(*args, **kwargs) == expected
            return
        with pytest.raises(expected) as caught:
            call(*args, **kwargs)
        if isinstance(caught.value, RunClosedError):
            assert caught.value.run == self.model.runs[caught.value.run.task_id, caught.value.run.attempt]

    @rule(task=TASKS, attempt=st.none() | ATTEMPTS, started_at=TIMES)
    def open(self, task: str, attempt: int | None, started_at: datetime) -> None:
        expected = self.model.open(task, attempt, started_at)
        self.agree(expected, self.history.open_run, task, attempt=attempt, started_at=started_at)

    @precondition(lambda self: self.model.runs)
    @rule(data=st.data())
    def tell_a_start_again(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(list(self.model.runs.values())))
        self.agree(run, self.history.open_run, run.task_id, attempt=run.attempt, started_at=run.started_at)

    @precondition(lambda self: self.model.runs)
    @rule(data=st.data(), phase=PHASES, error=ERRORS, code=CODES, end=TIMES)
    def close(self, data: st.DataObject, phase: TaskPhase, error: str | None, code: int | None, end: datetime) -> None:
        task, attempt = data.draw(st.sampled_from(list(self.model.runs)))
        self.close_run(task, attempt, phase, error, code, end)

    @rule(task=TASKS, attempt=ATTEMPTS, phase=PHASES, end=TIMES)
    def close_any(self, task: str, attempt: int, phase: TaskPhase, end: datetime) -> None:
        self.close_run(task, attempt, phase, None, None, end)

    @precondition(lambda self: any(not run.is_active for run in self.model.runs.values()))
    @rule(data=st.data(), end=TIMES)
    def tell_an_end_again(self, data: st.DataObject, end: datetime) -> None:
        run = data.draw(st.sampled_from([run for run in self.model.runs.values() if not run.is_active]))
        self.close_run(run.task_id, run.attempt, run.phase, run.error, run.exit_code, end)

    def close_run(
        self, task: str, attempt: int, phase: TaskPhase, error: str | None, code: int | None, end: datetime
    ) -> None:
        if phase is TaskPhase.SUCCEEDED:
            error = None
        expected = self.model.close(task, attempt, phase, error, code, end)
        self.agree(expected, self.history.close_run, task, attempt, phase, error=error, exit_code=code, finished_at=end)

    @rule(task=TASKS, attempt=ATTEMPTS, phase=st.sampled_from(list(RANKS)), started_at=TIMES)
    def recover(self, task: str, attempt: int, phase: TaskPhase, started_at: datetime) -> None:
        if (task, attempt) in self.model.runs:
            return
        run = TaskRun(task, attempt, phase, started_at, started_at, "not observed", recovered=True)
        row = {
            name: getattr(run, name) for name in ("task_id", "attempt", "phase", "started_at", "finished_at", "error")
        }
        with self.history._engine.connect() as connection:
            connection.execute(insert(task_runs).values(row | {"recovered": True}))
            connection.commit()
        self.model.runs[task, attempt] = run

    @rule(task=TASKS, phases=SOME_PHASES, limit=st.integers(1, 4))
    def read(self, task: str, phases: set[TaskPhase] | None, limit: int) -> None:
        expected = [run for run in self.model.of(task) if phases is None or run.phase in phases]
        assert self.history.last_run(task, phases=phases) == (expected[0] if expected else None)
        assert list(self.history.iter_runs(task, phases=phases)) == expected
        pages, cursor = [], None
        while True:
            page = self.history.runs(task, phases=phases, limit=limit, after=cursor)
            pages.append(page.runs)
            cursor = page.next_cursor
            if cursor is None:
                break
        assert list(itertools.chain(*pages)) == expected
        assert all(len(found) == limit for found in pages[:-1])
        assert self.history.active_runs(task) == sorted(
            (run for run in self.model.of(task) if run.is_active), key=lambda run: (run.started_at, run.attempt)
        )

    @rule(task=TASKS, attempt=ATTEMPTS)
    def get(self, task: str, attempt: int) -> None:
        assert self.history.get_run(task, attempt) == self.model.runs.get((task, attempt))

    @rule(limit=st.none() | st.integers(1, 4), after=st.none() | TASKS)
    def list_tasks(self, limit: int | None, after: str | None) -> None:
        names = sorted({task for task, _ in self.model.runs if after is None or task > after})[:limit]
        assert self.history.tasks(limit=limit, after=after) == [self.model.of(task)[0] for task in names]

    @invariant()
    def active_runs_agree(self) -> None:
        active = [run for run in self.model.runs.values() if run.is_active]
        expected = sorted(active, key=lambda run: (run.started_at, run.task_id, run.attempt))
        assert self.history.active_runs() == expected


EXAMPLES = {"sqlite": 40, "postgresql": 15, "mariadb": 15}


@pytest.mark.parametrize(
    ("kind", "examples"),
    [
        *((kind, EXAMPLES[kind]) for kind in KINDS),
        *(pytest.param(kind, 20 * EXAMPLES[kind], marks=pytest.mark.soak) for kind in KINDS),
    ],
)
def test_history_does_what_the_model_does(databases: Databases, kind: str, examples: int) -> None:
    machine = type("History", (Histories,), {"databases": databases, "kind": available(kind, databases)})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=25))


GROUPED = {"sqlite": 10, "postgresql": 4, "mariadb": 4}


@pytest.mark.parametrize(
    ("kind", "examples"),
    [
        *((kind, GROUPED[kind]) for kind in KINDS),
        *(pytest.param(kind, 20 * EXAMPLES[kind], marks=pytest.mark.soak) for kind in KINDS),
    ],
)
def test_history_with_group_commit_does_what_the_model_does(
    databases: Databases, kind: str, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "_write_one", lambda self, connection, call: self._write_all(connection, [call]))
    namespace = {"databases": databases, "kind": available(kind, databases), "group_commit": True}
    machine = type("Grouped", (Histories,), namespace)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=25))
