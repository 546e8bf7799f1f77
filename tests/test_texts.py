"""Task ids and error texts of every sort, on every database, sync and async: stored or refused."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from taskruns import RunClosedError, TaskPhase, TaskRunHistory
from taskruns.model import MAX_ERROR_BYTES

ODD_IDS = [
    "it's",
    'say "hi"',
    "back\\slash",
    "\\",
    "100%",
    "%s %(task_id)s",
    ":name ?",
    "under_score",
    "*",
    "back[up]?*",
    "😀 backup 🚀",
    "a'; DROP TABLE task_runs; --",
    "' OR '1'='1",
    "-- no comment",
    "$(rm -rf /)",
    "a b",
    "a\u00a0b",
    "zero\u200bwidth",
    "e\u0301",
    "\u202ertl",
    "\U0010ffff",
    "x" * 255,
    "😀" * 255,
]
REFUSED_IDS = [
    "",
    " ",
    "job ",
    " job",
    "job\n",
    "a\tb",
    "a\x00b",
    "a\x1bb",
    "a\x85b",
    "a\ud800b",
    "job\u2003",
    "x" * 256,
]


def test_odd_task_ids_are_stored_as_they_are(history: TaskRunHistory) -> None:
    for task_id in ODD_IDS:
        history.open_run(task_id, source=task_id, submission=task_id)
        closed = history.close_run(task_id, 1, TaskPhase.FAILED, error=task_id)
        assert (closed.task_id, closed.source, closed.submission, closed.error) == (task_id,) * 4
        assert history.get_run(task_id, 1) == closed
        assert history.last_run(task_id) == closed
        assert history.runs(task_id).runs == [closed]
    assert [run.task_id for run in history.tasks()] == sorted(ODD_IDS)


def test_task_ids_outside_the_rules_are_refused_by_every_call(history: TaskRunHistory) -> None:
    run = history.open_run("job")
    calls: list[Callable[[str], object]] = [
        history.open_run,
        lambda task_id: history.close_run(task_id, 1, TaskPhase.SUCCEEDED),
        lambda task_id: history.get_run(task_id, 1),
        history.last_run,
        history.runs,
        lambda task_id: list(history.iter_runs(task_id)),
        history.active_runs,
    ]
    for call, task_id in product(calls, REFUSED_IDS):
        with pytest.raises(ValueError, match="a task id has"):
            call(task_id)
    assert history.tasks() == [run]


def test_source_and_submission_follow_the_same_rules(history: TaskRunHistory) -> None:
    for name, value in product(["source", "submission"], ["x" * 256, "a\x00b", "end ", "\ud800"]):
        arguments: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"a {name} has"):
            history.open_run("job", **arguments)
    assert history.tasks() == []


def test_task_ids_of_another_type_are_refused(history: TaskRunHistory) -> None:
    task_ids: list[Any] = [None, 1, b"job"]
    for task_id in task_ids:
        with pytest.raises(TypeError, match="a task id is a string"):
            history.open_run(task_id)


def test_ids_that_look_alike_are_different_tasks(history: TaskRunHistory) -> None:
    alike = ["a", "A", "á", "a\u0301", "à", "ａ", "ß", "ss", "ı", "i", "I", "İ"]  # noqa: RUF001  (alike on purpose)
    assert [history.open_run(task).attempt for task in alike] == [1] * len(alike)
    assert sorted(run.task_id for run in history.tasks()) == sorted(alike)
    for task in alike:
        history.close_run(task, 1, TaskPhase.FAILED, error=task)
    assert [history.runs(task).runs[0].error for task in alike] == alike


def test_sql_wildcards_in_an_id_match_nothing_else(history: TaskRunHistory) -> None:
    for task in ("job1", "job2"):
        history.open_run(task)
    for pattern in ("job%", "job_", "job*", "%", "_"):
        assert history.runs(pattern).runs == []
        assert history.active_runs(pattern) == []


ERRORS = [
    ("", None),
    ("a\x00b", "a\ufffdb"),
    ("a\ud800\udfffb", "a\ufffd\ufffdb"),
    ("😀 \U0010ffff", "😀 \U0010ffff"),
    ("tab\tnew\r\nline \x1b[31mred\x1b[0m", "tab\tnew\r\nline \x1b[31mred\x1b[0m"),
    (" spaces around \n", " spaces around \n"),
    ("it's 100% \\ :name ?", "it's 100% \\ :name ?"),
    ("cannot reach postgresql://bob:secret@host/db", "cannot reach postgresql://bob:***@host/db"),
    ("redis://:secret@host and x://a:p@b", "redis://:***@host and x://a:***@b"),
    ("http://host:8080/a@b", "http://host:8080/a@b"),
]


def test_error_is_stored_cleaned(history: TaskRunHistory) -> None:
    for error, stored in ERRORS:
        attempt = history.open_run("job").attempt
        closed = history.close_run("job", attempt, TaskPhase.FAILED, error=error)
        assert closed.error == stored
        assert history.get_run("job", attempt) == closed
        assert history.close_run("job", attempt, TaskPhase.FAILED, error=error) == closed


def test_error_of_a_megabyte_keeps_its_head_and_its_tail(history: TaskRunHistory) -> None:
    for character in ("x", "é", "😀", "\x00", "\ud800"):
        attempt = history.open_run("job").attempt
        text = "HEAD" + character * 2**20 + "TAIL"
        error = history.close_run("job", attempt, TaskPhase.FAILED, error=text).error
        assert error is not None
        assert MAX_ERROR_BYTES - 64 < len(error.encode()) <= MAX_ERROR_BYTES
        assert error.startswith("HEAD")
        assert error.endswith("TAIL")
        assert "bytes cut" in error
        stored = history.get_run("job", attempt)
        assert stored is not None
        assert stored.error == error


def test_error_of_just_the_bound_is_kept_whole(history: TaskRunHistory) -> None:
    history.open_run("job")
    text = "é" * (MAX_ERROR_BYTES // 2)
    assert history.close_run("job", 1, TaskPhase.FAILED, error=text).error == text


def test_long_errors_that_differ_where_they_are_cut_are_the_same_outcome(history: TaskRunHistory) -> None:
    history.open_run("job")
    head, tail = "h" * 2**17, "t" * 2**17
    closed = history.close_run("job", 1, TaskPhase.FAILED, error=head + "1" + tail)
    assert history.close_run("job", 1, TaskPhase.FAILED, error=head + "2" + tail) == closed
    with pytest.raises(RunClosedError):
        history.close_run("job", 1, TaskPhase.FAILED, error="x" + head + tail)
