"""The same questions have the same answers on every database, and in plain Python (tests/memory.py)."""

from bisect import bisect_right
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from histories import Histories
from hypothesis import Phase, given, settings, strategies as st
from memory import Memory, Wanted, begin
from sqlalchemy import Engine, create_engine, delete

from taskruns import PROBLEMS, RunFilter, RunOrder, Span, TaskPhase, TaskRun, TaskRunHistory
from taskruns.schema import task_runs
from taskruns.windows import Window

TASKS = [*"aAb0é\uff5e\U0001f600", "a1", "ab", "a b", "a*", "a?c", "a[b]", "a_b", "a%b", r"a\b", "e\u0301"]
GLOBS = [
    "*",
    "a*",
    "a[*]",
    "a[?]c",
    "a[[]*",
    "a_*",
    "a%*",
    "[!a]*",
    "?",
    "a ?",
    "é*",
    "\U0001f600*",
    "[A-a]",
    "[!a-z]",
    "a?",
    "[ab][02]",
    "b",
    "c*",
]
ERRORS = ["100% sure", "a_b", r"C:\disk", "Broke", "broke", "é\U0001f600", "it's"]
PHASES = [phase for phase in TaskPhase if phase is not TaskPhase.PENDING]
ENDS = [phase for phase in PHASES if phase.is_terminal]
BERLIN, SAO_PAULO, LORD_HOWE = map(ZoneInfo, ("Europe/Berlin", "America/Sao_Paulo", "Australia/Lord_Howe"))
ZONES = [UTC, BERLIN, SAO_PAULO, LORD_HOWE, ZoneInfo("Asia/Kolkata")]
CHANGES = [
    datetime(2026, 3, 29, 1, tzinfo=UTC),  # Berlin's clocks are put forward,
    datetime(2026, 10, 25, 1, tzinfo=UTC),  # and back
    datetime(2018, 11, 4, 3, tzinfo=UTC),  # São Paulo's at midnight,
    datetime(2018, 2, 18, 2, tzinfo=UTC),
    datetime(2026, 10, 3, 15, 30, tzinfo=UTC),  # Lord Howe's by half an hour
    datetime(2026, 4, 4, 15, tzinfo=UTC),
    datetime(1970, 1, 1, tzinfo=UTC),
]
EARLIEST, LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
STEPS = [timedelta(hours=hours, minutes=minutes) for hours in (-24, -2, -1, 0, 1, 30) for minutes in (-30, 0, 29)]
BITS = [timedelta(microseconds=bit) for bit in (0, 1, 500_000, 999_499, 999_500, 999_999)]
SPANS = [timedelta(), *BITS[1:], *(timedelta(seconds=s, microseconds=999_500) for s in (0, 59, 3599, 86399, 400_000))]

moments = st.builds(
    lambda change, step, bit: change + step + bit,
    st.sampled_from(CHANGES),
    st.sampled_from(STEPS),
    st.sampled_from(BITS),
)


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    """Make a history with many things in common: starts, ends, numbers."""
    change = draw(st.sampled_from(CHANGES))
    starts = st.sampled_from([change + step + draw(st.sampled_from(BITS)) for step in STEPS])
    recovery = change + timedelta(hours=2, microseconds=draw(st.integers(0, 999_999)))
    ids = st.sampled_from(draw(st.lists(st.sampled_from(TASKS), min_size=2, max_size=9, unique=True)))
    keys = draw(st.lists(st.tuples(ids, st.integers(1, 30)), min_size=40, max_size=60, unique=True))
    return Memory([draw(runs(task_id, attempt, starts, recovery)) for task_id, attempt in keys])


@st.composite
def runs(
    draw: st.DrawFn, task_id: str, attempt: int, starts: st.SearchStrategy[datetime], recovery: datetime
) -> TaskRun:
    phase, started_at = draw(st.sampled_from(PHASES)), draw(starts)
    names: dict[str, Any] = {name: draw(st.sampled_from([None, "é", "E", "x%"])) for name in ("source", "submission")}
    if phase is TaskPhase.RUNNING:
        return TaskRun(task_id, attempt, phase, started_at, **names)
    recovered = draw(st.booleans()) and recovery >= started_at
    return TaskRun(
        task_id,
        attempt,
        phase,
        started_at,
        finished_at=recovery if recovered else started_at + draw(st.sampled_from(SPANS)),
        error=None if phase is TaskPhase.SUCCEEDED else draw(st.sampled_from([None, *ERRORS])),
        exit_code=draw(st.sampled_from([None, 0, 1, -1])),
        recovered=recovered,
        **names,
    )


some_phases = st.one_of(st.just(PROBLEMS), st.frozensets(st.sampled_from(TaskPhase), max_size=3))


@st.composite
def windows(draw: st.DrawFn, memory: Memory) -> Window:
    """Make a window whose ends are those of runs, or next to them."""
    times = [time for run in memory.runs for time in (run.started_at, run.finished_at) if time is not None]
    since, until = (
        draw(st.sampled_from(times)) + draw(st.sampled_from([timedelta(), timedelta(microseconds=1)])) for _ in range(2)
    )
    return draw(st.sampled_from([Window(min(since, until), max(since, until)), Window(since), Window(None, until)]))


@st.composite
def filters(draw: st.DrawFn, memory: Memory) -> Wanted:
    """Make a filter of a few conditions, most with a value that runs have."""
    run = draw(st.sampled_from(memory.runs))
    span = run.duration or timedelta(seconds=1)
    near = [span, span + timedelta(microseconds=1), span - timedelta(microseconds=1)]
    choices: dict[str, st.SearchStrategy[Any]] = {
        "task_id": st.just(run.task_id),
        "task_glob": st.sampled_from(GLOBS),
        "phases": some_phases,
        "started": windows(memory),
        "finished": windows(memory),
        "min_duration": st.sampled_from(near),
        "max_duration": st.sampled_from(near),
        "exit_code": st.sampled_from([0, 1, -1]),
        "source": st.sampled_from(["é", "E", "e", "x%"]),
        "submission": st.sampled_from(["é", "E", "x%", "x_"]),
        "recovered": st.booleans(),
        "active": st.booleans(),
        "error": st.sampled_from(["%", "_", "\\", "b", "B", "broke", "é", "\U0001f600", "'", "i"]),
    }
    names = draw(st.lists(st.sampled_from(list(choices)), max_size=3, unique=True))
    if "error" in names and not {"started", "finished"} & set(names):
        names.append("started")
    if {"min_duration", "max_duration"} <= set(names):  # in this order, or it would be refused
        choices |= {"min_duration": st.sampled_from(near[::2]), "max_duration": st.sampled_from(near[:2])}
    return Wanted(**{name: draw(choices[name]) for name in names})


class Asked:
    """A history that is asked what is known of it."""

    def __init__(self, history: TaskRunHistory, database: str, memory: Memory, data: st.DataObject) -> None:
        self.memory = memory
        self._history = history
        self._draw = data.draw
        engine: Engine = create_engine(database)
        with engine.begin() as connection:
            connection.execute(delete(task_runs))
        engine.dispose()
        assert history.add_runs(memory.runs).added == len(memory.runs)

    def about_runs(self) -> None:
        wanted, order = self._draw(filters(self.memory)), self._draw(st.sampled_from(RunOrder))
        if order is RunOrder.LONGEST and not (wanted.has_window or wanted.is_of_one_task):
            order = RunOrder.OLDEST
        size = self._draw(st.sampled_from([1, 2, 7, 59, 60, 100]))
        expected = self.memory.listed(wanted, order)
        if len(expected) > 20 * size:
            size = 20
        asked = RunFilter(**vars(wanted))
        found = [run for page in self._pages(asked, order, size) for run in page]
        assert (wanted, order, size, found) == (wanted, order, size, expected)
        those = self.memory.wanted(wanted)
        assert (wanted, self._history.count_runs(asked)) == (wanted, len(those))
        assert (wanted, list(filter(asked.matches, self.memory.runs))) == (wanted, those)

    def _pages(self, asked: RunFilter, order: RunOrder, size: int) -> Iterator[list[TaskRun]]:
        after = None
        while True:
            page = self._history.runs(asked, order=order, limit=size, after=after)
            yield page.runs
            after = page.next_cursor
            assert (asked, size, after is None or len(page.runs) == size) == (asked, size, True)
            if after is None:
                return

    def about_active_runs(self) -> None:
        wanted = self._draw(filters(self.memory))
        found = self._history.active_runs(RunFilter(**vars(wanted)))
        assert (wanted, found) == (wanted, self.memory.active(wanted))

    def about_the_last_run(self) -> None:
        task_id, phases = self._draw(st.sampled_from(TASKS)), self._draw(st.none() | some_phases)
        found = self._history.last_run(task_id, phases=phases)
        assert (task_id, phases, found) == (task_id, phases, self.memory.last(task_id, phases))

    def about_statistics(self) -> None:
        wanted = self._draw(filters(self.memory))
        by, zone = self._draw(st.sampled_from([None, *Span])), self._draw(st.sampled_from(ZONES))
        found = self._history.stats(RunFilter(**vars(wanted)), by=by, zone=zone)
        assert (wanted, by, zone, found) == (wanted, by, zone, self.memory.stats(wanted, by, zone))
        assert [part.start.isoformat() for part in found.parts] == [
            part.start.isoformat() for part in self.memory.stats(wanted, by, zone).parts
        ]

    def about_summaries(self, now: datetime) -> None:
        """Ask for some tasks at a time, as it were at ``now``."""
        glob, phases = self._draw(st.none() | st.sampled_from(GLOBS)), self._draw(st.none() | some_phases)
        window, age = (
            self._draw(st.just(Window()) | windows(self.memory)),
            self._draw(st.none() | st.sampled_from(SPANS)),
        )
        question = {"task_glob": glob, "phases": phases, "window": window, "stale_after": age}
        limit, after = self._draw(st.sampled_from([1, 3, 50])), self._draw(st.none() | st.sampled_from(TASKS))
        found: list[Any] = []
        last = after
        while page := self._history.summaries(**question, limit=limit, after=last):  # type: ignore[arg-type]  # a dict
            assert (question, len(page) <= limit) == (question, True)
            found += page
            last = page[-1].task_id
        expected = self.memory.summaries(glob, phases, None if age is None else now - age, window)
        expected = [summary for summary in expected if after is None or summary.task_id > after]
        assert (question, limit, after, found) == (question, limit, after, expected)


def ask_everything(
    history: TaskRunHistory, database: str, memory: Memory, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(history, database, memory, data)
    now = data.draw(moments)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return now

    monkeypatch.setattr("taskruns.summaries.datetime", Clock)
    for few in (0, 2, 5000):  # what the database does by itself, and what is done here
        monkeypatch.setattr("taskruns.reading.FEW", few)
        monkeypatch.setattr("taskruns.reading.MANY", few)
        for _ in range(4):
            asked.about_runs()
            asked.about_active_runs()
            asked.about_the_last_run()
            asked.about_statistics()
        asked.about_summaries(now)
    assert (history.tasks(), list(history.all_runs())) == (
        memory.tasks(),
        sorted(memory.runs, key=lambda run: (run.task_id, run.attempt)),
    )


@settings(max_examples=4, phases=[Phase.generate])
@given(memory=memories(), data=st.data())
def test_the_same_questions_have_the_same_answers(
    database: str, memory: Memory, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TaskRunHistory.connect(database) as history:
        ask_everything(history, database, memory, data, monkeypatch)


@pytest.mark.parametrize("histories", ["async"], indirect=True)
@settings(max_examples=2, phases=[Phase.generate])
@given(memory=memories(), data=st.data())
def test_the_asynchronous_twin_has_the_same_answers(
    database: str, histories: Histories, memory: Memory, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_everything(histories.connect(database), database, memory, data, monkeypatch)


@pytest.mark.parametrize("few", [0, 5000])
def test_durations_whose_sum_is_more_than_a_number_holds_have_a_mean(
    database: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskruns.reading.FEW", few)
    runs = [TaskRun("a", 1, TaskPhase.SUCCEEDED, EARLIEST, EARLIEST + timedelta(microseconds=300))]
    runs += [TaskRun("a", attempt, TaskPhase.FAILED, EARLIEST, LATEST) for attempt in range(2, 301)]
    with TaskRunHistory.connect(database) as history:
        history.add_runs(runs)
        duration = history.stats("a").duration
    longest = LATEST - EARLIEST
    assert duration is not None
    assert (duration.mean, duration.max) == (longest - longest / 300 + timedelta(microseconds=1), longest)


@pytest.mark.parametrize("by", Span)
@pytest.mark.parametrize("zone", ZONES)
@settings(max_examples=50)
@given(times=st.lists(moments, min_size=1, max_size=5))
def test_the_parts_of_time_are_those_of_the_clock(by: Span, zone: Any, times: list[datetime]) -> None:
    for moment in times:
        start = by.start(by.number(moment, zone), zone)
        assert (moment, start.astimezone(UTC)) == (moment, begin(moment, by, zone))


@pytest.mark.parametrize("by", Span)
@pytest.mark.parametrize("zone", ZONES)
def test_the_ends_of_time_are_in_a_part(by: Span, zone: Any) -> None:
    for first, last in ((EARLIEST, EARLIEST + timedelta(days=2)), (LATEST - timedelta(days=2), LATEST)):
        assert by.segments(zone, first, last)
        for moment in (first, last):
            assert abs(by.start(by.number(moment, zone), zone) - moment) < timedelta(days=2)


@pytest.mark.parametrize("by", Span)
@pytest.mark.parametrize("zone", ["Africa/Freetown", "Africa/Casablanca", "Asia/Gaza", "Australia/Lord_Howe"])
def test_offsets_of_all_time_are_found_quickly_and_are_few(by: Span, zone: str) -> None:
    clocks = ZoneInfo(zone)
    began = monotonic()
    segments = by.segments(clocks, EARLIEST, LATEST)
    assert monotonic() - began < 2
    assert len(segments) < 700
    ends = [until for until, _ in segments if until is not None]
    assert ends == sorted(ends)
    near = [end - timedelta(seconds=1) for end in ends] + ends
    far = [EARLIEST + timedelta(days=997 * step, hours=step % 24) for step in range(3660)]
    war, summers = datetime(1939, 9, 1, tzinfo=UTC), datetime(2040, 9, 25, tzinfo=UTC)  # clocks change within days
    hours = [since + timedelta(hours=hour, minutes=59) for since in (war, summers) for hour in range(24 * 40)]
    for moment in (*near, *far, *hours):
        offset = segments[bisect_right(ends, moment)][1]
        seconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
        expected = (seconds + offset) // 86400 if by is Span.DAY else seconds - (seconds + offset) % 3600
        assert (moment, by.number(moment, clocks)) == (moment, expected)


@pytest.mark.parametrize("by", Span)
def test_runs_of_all_time_are_divided_as_here(database: str, by: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [datetime(year, 7, 1, 22, 10, tzinfo=UTC) for year in (1, 1799, 1850, 1945, 2026, 2099, 2100, 2500)]
    starts = [EARLIEST, EARLIEST + timedelta(days=1), *changes, LATEST - timedelta(days=1), LATEST]
    with TaskRunHistory.connect(database) as history:
        history.add_runs([TaskRun("a", number, TaskPhase.RUNNING, start) for number, start in enumerate(starts, 1)])
        for zone in (BERLIN, LORD_HOWE):
            here = history.stats("a", by=by, zone=zone)
            with monkeypatch.context() as patched:
                patched.setattr("taskruns.reading.FEW", 0)
                assert history.stats("a", by=by, zone=zone) == here


def test_offsets_are_found_if_the_last_run_started_right_after_clocks_changed() -> None:
    for change in CHANGES:
        for bit in BITS:
            for zone in ZONES:
                assert len(Span.DAY.segments(zone, change - timedelta(hours=3) - bit, change + bit)) <= 2
