"""``taskruns stats``, against a plain Python computation over the exported runs."""

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from commands import Home, Shell
from hypothesis import example, given, strategies as st
from servers import Databases
from test_output import on_terminal

from taskruns import TaskPhase, TaskRun, TaskRunHistory
from taskruns.cli.plots import bar_of, plots_of
from taskruns.model import PROBLEMS
from taskruns.stats import DurationStats, RunStats, Span, StatsPart, mean_of
from taskruns.windows import Window

BERLIN = ZoneInfo("Europe/Berlin")
START = datetime(2026, 10, 20, 21, 30, tzinfo=UTC)  # the clocks of Berlin go back on the 25th
OUTCOMES = [*[TaskPhase.SUCCEEDED] * 5, TaskPhase.FAILED, TaskPhase.TIMEOUT, TaskPhase.CANCELED]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(home, monkeypatch, capsys)


def run_of(attempt: int, *, task: str = "backup", hours: int = 5) -> TaskRun:
    started_at = START + timedelta(hours=hours * attempt, microseconds=attempt)
    took = timedelta(milliseconds=1500 * (attempt * 7919 % 101), microseconds=attempt * 37 % 1000)
    return TaskRun(
        task_id=task,
        attempt=attempt,
        phase=OUTCOMES[attempt % len(OUTCOMES)],
        started_at=started_at,
        finished_at=started_at + took,
    )


def filled(url: str) -> str:
    """Runs of ten days, one that is active, and one of another task."""
    with TaskRunHistory.connect(url) as history:
        runs = [run_of(attempt) for attempt in range(1, 49) if attempt not in (20, 21, 22, 23, 24)]
        active = TaskRun("backup", 49, TaskPhase.RUNNING, START + timedelta(hours=245))
        history.add_runs([*runs, active, run_of(1, task="other")])
    return url


@pytest.fixture
def database(sqlite: str) -> str:
    return filled(sqlite)


@pytest.fixture(params=[0, 5000], ids=["sorted-there", "few"])
def any_database(
    request: pytest.FixtureRequest, databases: Databases, kind: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Each of the databases, with more runs than are looked at here, or not."""
    monkeypatch.setattr("taskruns.reading.FEW", request.param)
    return filled(databases.migrated(kind))


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def computed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the command should say of some exported runs."""
    by_phase = {phase.value: sum(run["phase"] == phase for run in runs) for phase in TaskPhase}
    problems = [run for run in runs if run["phase"] in ("failed", "timeout", "exhausted")]
    successes = [run for run in runs if run["phase"] == "succeeded"]
    ended = [run for run in runs if "finishedAt" in run]
    spans = sorted((moment(run["finishedAt"]) - moment(run["startedAt"])) / timedelta(milliseconds=1) for run in ended)

    def at(percent: int) -> float:
        return spans[ceil(percent * len(spans) / 100) - 1]

    wire: dict[str, Any] = {"runs": len(runs), "byPhase": {phase: count for phase, count in by_phase.items() if count}}
    if successes or problems:
        wire["successRate"] = len(successes) / len(successes + problems)
    if successes:
        wire["attemptsPerSuccess"] = len(ended) / len(successes)
        wire["lastSuccessAt"] = max(run["finishedAt"] for run in successes)
    if problems:
        wire["lastProblemAt"] = max(run["finishedAt"] for run in problems)
    if spans:
        percentiles = {f"p{percent}": at(percent) for percent in (50, 95, 99)}
        mean = pytest.approx(sum(spans) / len(spans), abs=0.001)
        wire["durationMs"] = {"mean": mean, "min": spans[0], "max": spans[-1]} | percentiles
    return wire


def exported(shell: Shell, database: str, task: str = "backup") -> list[dict[str, Any]]:
    runs = map(json.loads, shell("export", "--db", database).out.splitlines())
    return [run for run in runs if run.get("taskId") == task]


def test_json_is_one_object_equal_to_a_plain_computation(shell: Shell, any_database: str) -> None:
    runs = exported(shell, any_database)
    answer = shell("stats", "backup", "--json", "--db", any_database)
    assert (answer.status, answer.err) == (0, "")
    assert json.loads(answer.out) == {"taskId": "backup"} | computed(runs)


@pytest.mark.parametrize(("by", "digits"), [("day", 10), ("hour", 13)])
def test_parts_are_days_or_hours_of_the_time_zone(shell: Shell, any_database: str, by: str, digits: int) -> None:
    def start(run: dict[str, Any]) -> str:
        local = moment(run["startedAt"]).astimezone(BERLIN)
        return local.replace(hour=0 if by == "day" else local.hour, minute=0, second=0, microsecond=0).isoformat()

    runs = sorted(exported(shell, any_database), key=lambda run: str(run["startedAt"]))
    expected = [{"start": key} | computed(list(some)) for key, some in groupby(runs, start)]
    answer = shell("stats", "backup", "--by", by, "--tz", "Europe/Berlin", "--json", "--db", any_database)
    assert json.loads(answer.out)[f"by{by.capitalize()}"] == expected
    table = shell("stats", "backup", "--by", by, "--tz", "Europe/Berlin", "--db", any_database).out.split("\n\n")[1]
    starts = [line[:digits] for line in table.splitlines()[1:]]
    assert starts == [part["start"].replace("T", " ")[:digits] for part in expected]


def test_parts_of_utc_start_in_utc(shell: Shell, database: str) -> None:
    parts = json.loads(shell("stats", "--by", "day", "--json", "--db", database).out)["byDay"]
    assert parts[0]["start"] == "2026-10-21T00:00:00Z"


def test_window_and_glob_are_told(shell: Shell, database: str) -> None:
    wire = json.loads(shell("stats", "b*", "--started", "2026-10-22..", "--json", "--db", database).out)
    assert (wire["taskGlob"], wire["started"]) == ("b*", {"since": "2026-10-22T00:00:00.000000Z"})
    lines = shell("stats", "b*", "--started", "2026-10-22..2026-10-22", "--db", database).out.splitlines()
    assert lines[:2] == [
        "tasks         b*",
        "started       2026-10-22 00:00:00 until 2026-10-23 00:00:00 UTC",
    ]


def test_all_tasks_and_filters(shell: Shell, database: str) -> None:
    assert json.loads(shell("stats", "--json", "--db", database).out)["runs"] == 45
    problems = json.loads(shell("stats", "--problems", "--json", "--db", database).out)
    assert set(problems["byPhase"]) == {"failed", "timeout"}
    assert problems["successRate"] == 0


def test_known_task_without_runs_in_the_window_has_none(shell: Shell, database: str) -> None:
    answer = shell("stats", "other", "--started", "2020-01-01", "--json", "--by", "day", "--db", database)
    wire = json.loads(answer.out)
    assert (answer.status, wire["runs"], wire["byPhase"], wire["byDay"]) == (0, 0, {}, [])
    answer = shell("stats", "other", "--started", "2020-01-01", "--by", "day", "--db", database)
    assert (answer.status, answer.out.splitlines()[-1]) == (0, "runs          0")


def test_unknown_task_is_said(shell: Shell, database: str) -> None:
    answer = shell("stats", "nobody", "--json", "--db", database)
    assert (answer.status, answer.out, answer.err) == (1, "", "taskruns: no run of nobody\n")
    assert shell("stats", "nobody-*", "--db", database).status == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--since", "0001-01-01T00:00Z", "--tz", "America/New_York"),
        ("--by", "week"),
        ("--since", "soon"),
        ("--tz", "Mars"),
        ("--since", "1d", "--started", "1d"),
        ("a", "b"),
    ],
)
def test_wrong_usage_is_one_line(shell: Shell, database: str, options: tuple[str, ...]) -> None:
    answer = shell("stats", *options, "--db", database)
    assert (answer.status, answer.out, len(answer.err.splitlines())) == (2, "", 1)


def test_text_in_a_pipe(shell: Shell, sqlite: str) -> None:
    with TaskRunHistory.connect(sqlite) as history:
        history.add_runs([run_of(attempt) for attempt in (4, 5, 6, 9)])
    answer = shell("stats", "backup", "--by", "day", "--db", sqlite)
    ago = re.compile(r", .+ ago$", re.MULTILINE)
    assert ago.sub("", answer.out) == (
        "task          backup\n"
        "runs          4\n"
        "  succeeded   2   50.0 %\n"
        "  failed      1   25.0 %\n"
        "  timeout     1   25.0 %\n"
        "success rate  50.0 %, 2.00 attempts for each success\n"
        "duration      min  4.5 s     p50  1m 06s    mean 1m 06s\n"
        "              p95  1m 39s    p99  1m 39s    max  1m 39s\n"
        "last success  2026-10-22 18:31:39 UTC\n"
        "last problem  2026-10-22 03:31:06 UTC\n"
        "\n"
        "DAY (UTC)   RUNS  PROBLEMS  SUCCESS  P50     P95\n"
        "2026-10-21  2     1         50.0 %   4.5 s   1m 35s\n"
        "2026-10-22  2     1         50.0 %   1m 06s  1m 39s\n"
    )
    assert answer.err == ""


@pytest.mark.parametrize(
    ("some", "of", "told"),
    [(0, 9, "0.0 %"), (1, 10**6, "0.1 %"), (9999, 10**4, "99.9 %"), (2, 3, "66.7 %"), (7, 7, "100.0 %")],
)
def test_only_all_are_a_hundred_per_cent(some: int, of: int, told: str) -> None:
    from taskruns.cli.output import percent

    assert percent(some, of) == told


def plain(printed: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", printed)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_plots_fit_a_terminal(home: Home, database: str, columns: int) -> None:
    printed = on_terminal(home, "stats", "backup", "--db", database, columns=columns)
    drawn = plain(printed)[plain(printed).index("durations") :].splitlines()
    assert max(len(line) for line in drawn) <= columns
    assert all(line == line.rstrip() for line in drawn)
    assert drawn[0].endswith("⠒⠒ p50  + p95")
    assert "25 Oct" in drawn[10] or "26 Oct" in drawn[10]
    assert re.search(r"\x1b\[3[12]m", printed[printed.index("outcomes") :])
    assert "░ canceled" in plain(printed)


def days(*offsets: int, runs: int = 1, seconds: int = 1) -> list[StatsPart]:
    spans = DurationStats.of([timedelta(seconds=seconds)] * runs)
    stats = RunStats({TaskPhase.SUCCEEDED: runs}, spans)
    return [StatsPart(datetime(2026, 1, 5, tzinfo=UTC) + timedelta(days=offset), stats) for offset in offsets]


@given(st.integers(0, 10**9), st.integers(1, 50))
@example(5, 2)
@example(7, 2)
def test_a_mean_is_rounded_as_a_timedelta_is(microseconds: int, count: int) -> None:
    assert mean_of(microseconds, count) == timedelta(microseconds=microseconds) / count


def test_days_without_runs_are_gaps() -> None:
    lowest = plots_of(days(0, 1, 3), Span.DAY, Window(), 26).plain.splitlines()[-3]
    assert lowest == "        │███ ███     ███"


@pytest.mark.parametrize(
    ("number", "width", "columns"), [(70, 80, 70), (71, 80, 11), (700, 80, 50), (70, 20, 10), (9, 1, 1)]
)
def test_more_days_than_columns_are_put_together(number: int, width: int, columns: int) -> None:
    plot = plots_of(days(*range(number)), Span.DAY, Window(), width).plain
    axis = next(line for line in plot.splitlines() if "└" in line)
    cells = len(axis) - 9
    assert cells % columns == 0
    assert len(axis) <= max(width, 10)
    assert ("highest" in plot) == (columns < number)


def test_durations_that_are_equal_or_nothing_can_be_plotted() -> None:
    assert "1 ms" in plots_of(days(0, 1, seconds=0), Span.DAY, Window(), 80).plain
    active = [StatsPart(START + timedelta(days=day), RunStats({TaskPhase.RUNNING: 1})) for day in (0, 1)]
    assert "▚ running" in plots_of(active, Span.DAY, Window(), 80).plain


def test_plot_shows_the_whole_window() -> None:
    window = Window(datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 29, tzinfo=UTC))
    axis = next(line for line in plots_of(days(0, 1), Span.DAY, window, 80).plain.splitlines() if "└" in line)
    assert len(axis) == 9 + 28 * 2


@given(
    st.dictionaries(st.sampled_from(sorted({*TaskPhase} - {TaskPhase.PENDING})), st.integers(1, 10**4), min_size=1),
    st.integers(0, 10**5),
)
@example({TaskPhase.SUCCEEDED: 21, TaskPhase.FAILED: 1}, 264)
@example({TaskPhase.SUCCEEDED: 83, TaskPhase.FAILED: 9, TaskPhase.TIMEOUT: 5, TaskPhase.EXHAUSTED: 3}, 0)
@example({TaskPhase.SUCCEEDED: 10**4, TaskPhase.TIMEOUT: 1}, 5 * 10**4)
def test_bars_have_the_proportions_of_the_runs(by_phase: dict[TaskPhase, int], more: int) -> None:
    runs, problems = sum(by_phase.values()), sum(by_phase.get(phase, 0) for phase in PROBLEMS)
    most = runs + more
    bar, highest = bar_of(by_phase, most), bar_of({TaskPhase.SUCCEEDED: most}, most)
    assert len(bar) >= 1
    assert abs(len(bar) - runs * len(highest) / most) < 1
    assert set(bar) <= set(by_phase)
    shown = sum(phase in PROBLEMS for phase in bar)
    assert abs(shown - problems * len(bar) / runs) < 1
    assert shown or not problems
    if len(bar) > 1:
        assert shown < len(bar) or problems == runs


def test_bar_with_few_cells_shows_the_worst_phases() -> None:
    by_phase = {TaskPhase.SUCCEEDED: 97, TaskPhase.FAILED: 1, TaskPhase.TIMEOUT: 1, TaskPhase.EXHAUSTED: 1}
    assert bar_of(by_phase, 1200) == [TaskPhase.EXHAUSTED]
    assert bar_of(by_phase, 600) == [TaskPhase.EXHAUSTED, TaskPhase.SUCCEEDED]


def mixed() -> list[StatsPart]:
    stats = RunStats(dict.fromkeys({*TaskPhase} - {TaskPhase.PENDING}, 1))
    return [StatsPart(START + timedelta(days=day), stats) for day in (0, 1)]


def test_every_phase_has_a_character_of_its_own() -> None:
    legend, *bars = plots_of(mixed(), Span.DAY, Window(), 200).plain.partition("outcomes")[2].splitlines()
    blocks = {item[0] for item in legend.split("  ") if item}
    assert len(blocks) == 6
    assert blocks == {line[9:10] for line in bars[1:13]}


def test_legend_is_wrapped_between_its_items() -> None:
    lines = plots_of(mixed(), Span.DAY, Window(), 60).plain.partition("\n\n")[2].splitlines()
    assert re.findall("[a-z]+", lines[0]) == ["outcomes", "exhausted", "failed", "timeout", "canceled"]
    assert lines[1] == "          █ succeeded  ▚ running"


def test_scale_of_outcomes_starts_on_the_base_line() -> None:
    plot = plots_of(days(0, 1, runs=7), Span.DAY, Window(), 80).plain.splitlines()
    assert plot[-2].startswith("      0 └")
    assert [line[:10] for line in plot if "█" in line][1] == "      7 ┤█"


@pytest.mark.parametrize(("weeks", "first"), [(52, "5 Jan  "), (53, "5 Jan 2026")])
def test_dates_have_years_where_they_would_not_be_clear(weeks: int, first: str) -> None:
    dates = plots_of(days(0, 7 * weeks - 1), Span.DAY, Window(), 80).plain.splitlines()[-1]
    assert dates.strip().startswith(first)


def test_plots_have_no_colour_where_none_is_wanted(home: Home, database: str) -> None:
    printed = on_terminal(home, "stats", "backup", "--by", "hour", "--db", database, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", printed)
    assert "┤" in printed


def test_terminal_that_lacks_the_characters_gets_no_plots(home: Home, database: str) -> None:
    printed = on_terminal(home, "stats", "backup", "--db", database, PYTHONIOENCODING="ascii")
    assert "last problem" in printed
    assert "durations" not in printed


def test_terminal_without_the_library_is_told_how_to_get_plots(
    shell: Shell, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskruns.cli.stats.find_spec", lambda _name: None)
    monkeypatch.delitem(sys.modules, "taskruns.cli.plots", raising=False)
    assert "taskruns[plot]" not in shell("stats", "backup", "--db", database).out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    answer = shell("stats", "backup", "--db", database)
    assert "durations" not in answer.out
    assert plain(answer.out).splitlines()[-1] == "plots over time: pip install 'taskruns[plot]'"
    assert "taskruns.cli.plots" not in sys.modules


def test_pipe_gets_no_plots_and_does_not_import_the_library(
    shell: Shell, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotille", None)
    monkeypatch.delitem(sys.modules, "taskruns.cli.plots", raising=False)
    assert shell("stats", "backup", "--by", "day", "--db", database).status == 0
