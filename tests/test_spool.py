"""What cannot be written is kept, and replayed once, in order, whatever is killed meanwhile."""

import contextlib
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from commands import Home
from sqlalchemy import Engine, make_url

from taskruns import RunClosedError, TaskPhase, TaskRun, TaskRunHistory, engine, replay as replaying, spool
from taskruns.kept import Mark
from taskruns.model import Outcome
from taskruns.replay import Replayed, replay
from taskruns.spool import Spool
from taskruns.times import rfc3339
from taskruns.url import parse_url

FROM = datetime(2026, 3, 1, 2, tzinfo=UTC)


def run(seconds: float, task: str = "job", **more: Any) -> TaskRun:
    return TaskRun.starting(task, 1, started_at=FROM + timedelta(seconds=seconds), source="here", **more)


def outcome(seconds: float, phase: TaskPhase = TaskPhase.SUCCEEDED, **more: Any) -> Outcome:
    given = {"error": None, "exit_code": None, **more}
    return Outcome.of(phase, finished_at=FROM + timedelta(seconds=seconds), **given)


def event(seconds: float, kind: str = "TaskStarting", attempt: int = 1) -> dict[str, Any]:
    at = (FROM + timedelta(seconds=seconds)).isoformat()
    return {"kind": kind, "task": "told", "attempt": attempt, "at": at}


class Kept:
    """A spool and the database that it is for."""

    def __init__(self, database: str) -> None:
        self.database = database
        self.url = parse_url(database)
        self.spool = Spool(self.url)
        self.engine: Engine = engine.create(self.url)

    def replay(self, **options: Any) -> Replayed:
        return replay(self.engine, self.url, **options)

    def add(self, began: float, ended: float, phase: TaskPhase = TaskPhase.SUCCEEDED, **more: Any) -> TaskRun:
        one = self.spool.add_start(run(began))
        self.spool.add_end(one, outcome(ended, phase, **more))
        return one

    def runs(self, task: str = "job") -> list[TaskRun]:
        with TaskRunHistory.connect(self.database) as history:
            return list(history.iter_runs(task))[::-1]

    def facts(self) -> list[tuple[int, str, float, float | None]]:
        """Return each run's number, phase, start and end, in seconds."""
        return [
            (
                one.attempt,
                one.phase.value,
                (one.started_at - FROM).total_seconds(),
                None if one.finished_at is None else (one.finished_at - FROM).total_seconds(),
            )
            for one in self.runs()
        ]

    @property
    def files(self) -> list[Path]:
        return spool.files(self.url)


@pytest.fixture
def kept(database: str) -> Iterator[Kept]:
    found = Kept(database)
    yield found
    found.engine.dispose()


@pytest.fixture
def kept_sqlite(sqlite: str) -> Iterator[Kept]:
    found = Kept(sqlite)
    yield found
    found.engine.dispose()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_replayed_runs_are_as_they_were_and_numbered_on(kept: Kept) -> None:
    with TaskRunHistory.connect(kept.database) as history:
        history.open_run("job", started_at=FROM + timedelta(seconds=100))
    kept.add(0, 2)
    kept.add(3, 4, TaskPhase.FAILED, error="a\udcff b\n🙂", exit_code=3)
    kept.add(5, 6, TaskPhase.EXHAUSTED, error="policy_exhausted_success")
    kept.add(7, 8, TaskPhase.TIMEOUT)
    kept.add(9, 8, TaskPhase.CANCELED, error="by hand")
    kept.add(10, 11, TaskPhase.FAILED)
    replayed = kept.replay()
    assert (replayed.events, replayed.files, replayed.is_complete, replayed.left) == (12, 1, True, [])
    assert kept.facts()[1:] == [
        (2, "succeeded", 0, 2),
        (3, "failed", 3, 4),
        (4, "exhausted", 5, 6),
        (5, "timeout", 7, 8),
        (6, "canceled", 9, 9),
        (7, "failed", 10, 11),
    ]
    assert [(one.error, one.exit_code, one.source) for one in kept.runs()[2:4]] == [
        ("a\N{REPLACEMENT CHARACTER} b\n🙂", 3, "here"),
        ("policy_exhausted_success", None, "here"),
    ]
    assert [one.error for one in kept.runs()[4:]] == [None, "by hand", None]
    assert kept.files == []
    assert kept.replay() == Replayed()


def test_replaying_again_changes_nothing(kept: Kept) -> None:
    first = kept.spool.add_start(run(0, submission="s", source_attempt=0))
    second = kept.spool.add_start(run(0))
    kept.spool.add_end(second, outcome(2))
    kept.spool.add_end(first, outcome(3, TaskPhase.FAILED, error="no"))
    kept.spool.add_events("stream", [event(1), event(2, "TaskStopped"), event(3, attempt=2)])
    [path] = kept.files
    content = path.read_bytes()
    kept.replay()
    before = kept.runs(), kept.runs("told")
    assert [len(runs) for runs in before] == [2, 2]
    path.write_bytes(content)
    assert kept.replay().events == 7
    assert (kept.runs(), kept.runs("told")) == before


def test_end_alone_makes_the_run_or_closes_the_one_it_names(kept: Kept) -> None:
    with TaskRunHistory.connect(kept.database, source="here") as history:
        opened = [history.open_run("job", started_at=FROM + timedelta(seconds=n)) for n in range(4)]
        history.close_run("job", 2, TaskPhase.CANCELED)
        history.close_run("job", 3, TaskPhase.FAILED, error="same")
    kept.spool.add_end(opened[0], outcome(9), attempt=1)
    kept.spool.add_end(opened[1], outcome(9), attempt=2)
    kept.spool.add_end(opened[2], outcome(9, TaskPhase.FAILED, error="same"), attempt=3)
    kept.spool.add_end(run(77), outcome(9), attempt=4)  # that number is another run's by now
    kept.spool.add_end(run(77), outcome(9), attempt=40)
    kept.spool.add_end(run(5), outcome(9))
    assert kept.replay().marks == {Mark.CONTRADICTED: 1, Mark.PRUNED: 2}
    assert [(one.attempt, one.phase.value) for one in kept.runs()] == [
        (1, "succeeded"),
        (2, "canceled"),
        (3, "failed"),
        (4, "running"),
        (5, "succeeded"),
    ]


def test_start_that_was_written_after_all_is_not_doubled(kept: Kept) -> None:
    one = kept.spool.add_start(run(0))
    kept.spool.add_end(one, outcome(1))
    with TaskRunHistory.connect(kept.database, source="here") as history:
        history.open_run("job", started_at=one.started_at)
    kept.replay()
    assert kept.facts() == [(1, "succeeded", 0, 1)]


def test_living_owner_keeps_its_file_until_its_last_end(kept_sqlite: Kept) -> None:
    kept = kept_sqlite
    first, second = kept.spool.add_start(run(0)), kept.spool.add_start(run(1))
    kept.spool.add_end(first, outcome(2))
    replayed = kept.replay()
    assert (replayed.left, replayed.events, kept.runs()) == (kept.files, 0, [])
    [waiting] = spool.waiting(kept.url)
    assert (waiting.events, waiting.is_alive) == (3, True)
    kept.spool.add_end(second, outcome(3))
    [waiting] = spool.waiting()
    assert (waiting.events, waiting.is_alive, waiting.path) == (4, False, kept.files[0])
    assert abs(waiting.oldest - datetime.now(UTC)) < timedelta(minutes=5)
    assert waiting.database == f"sqlite:///{kept.url.database}"
    assert kept.replay().events == 4
    assert spool.waiting() == []


def test_runs_of_one_moment_are_told_apart(kept_sqlite: Kept) -> None:
    runs = [kept_sqlite.spool.add_start(run(0)) for _ in range(3)]
    for number, one in enumerate(runs):
        kept_sqlite.spool.add_end(one, outcome(number + 1))
    kept_sqlite.replay()
    assert [fact[3] for fact in kept_sqlite.facts()] == [1, 2, 3]


def die_with_open_start(database: str) -> None:
    code = (
        "import os, sys; sys.path[:0] = sys.argv[2:]\n"
        "from test_spool import Kept, outcome, run\n"
        "kept = Kept(sys.argv[1]); kept.add(0, 1); kept.spool.add_start(run(2)); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, database, *sys.path], check=False)
    assert done.returncode == -signal.SIGKILL


def test_start_of_a_dead_process_is_closed_as_not_observed(kept: Kept) -> None:
    die_with_open_start(kept.database)
    kept.replay()
    first, lost = kept.runs()
    assert (first.phase, first.recovered) == (TaskPhase.SUCCEEDED, False)
    assert (lost.phase, lost.recovered) == (TaskPhase.FAILED, True)
    assert lost.finished_at is not None
    assert lost.finished_at > lost.started_at  # when the file was written last
    assert re.fullmatch(
        rf"run outcome not observed \(supervisor .+:\d+ last seen {rfc3339(lost.finished_at)}\)", lost.error or ""
    )
    with TaskRunHistory.connect(kept.database) as history:  # its real outcome stands
        history.close_run("job", lost.attempt, TaskPhase.SUCCEEDED)


def test_start_of_a_dead_process_that_the_database_has_closed_stays(kept_sqlite: Kept) -> None:
    die_with_open_start(kept_sqlite.database)
    with TaskRunHistory.connect(kept_sqlite.database, source="here") as history:
        one = history.open_run("job", started_at=FROM + timedelta(seconds=2))
        history.close_run("job", one.attempt, TaskPhase.CANCELED)
    kept_sqlite.replay()
    assert [(one.phase.value, one.recovered) for one in kept_sqlite.runs()] == [
        ("canceled", False),
        ("succeeded", False),
    ]


def test_torn_last_line_is_ignored(kept_sqlite: Kept) -> None:
    kept_sqlite.add(0, 1)
    [path] = kept_sqlite.files
    with path.open("ab") as file:
        file.write(b'{"kind": "TaskStarting", "task": "jo')
    assert kept_sqlite.replay().marks == {}
    assert kept_sqlite.facts() == [(1, "succeeded", 0, 1)]
    path.write_bytes(b'{"spool": 1, "d')
    kept_sqlite.replay()
    assert kept_sqlite.files == []


def test_what_cannot_be_used_is_kept_and_stops_nothing(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    kept.add(0, 1)
    [path] = kept.files
    good = path.read_bytes().splitlines(keepends=True)
    start, end = (json.loads(line) for line in good[1:])
    wrong = [
        b"nonsense\n",
        b"[]\n",
        b"[" * 100_000 + b"\n",
        b"\xff\n",
        *(
            json.dumps(line).encode() + b"\n"
            for line in (
                start | {"task": " "},
                start | {"task": None},
                start | {"kind": "Another"},
                end | {"kind": "TaskStopped", "reason": "none is due"},
                end | {"run": "1"},
                end | {"at": "yesterday"},
                {"kind": "TaskStarting", "task": "told", "at": start["at"]},  # without a source
                {"kind": "TaskStarting", "task": "", "at": start["at"], "source": "stream"},
            )
        ),
    ]
    path.write_bytes(good[0] + good[1] + b"".join(wrong) + good[2])
    assert kept.replay().marks == {Mark.REJECTED: len(wrong)}
    assert kept.facts() == [(1, "succeeded", 0, 1)]
    assert path.with_suffix(".rejected").read_bytes() == b"".join(wrong)
    assert stat.S_IMODE(path.with_suffix(".rejected").stat().st_mode) == 0o600
    assert len(caplog.records) == 1
    assert kept.files == []


def test_line_that_the_database_refuses_stops_nothing(kept: Kept) -> None:
    with TaskRunHistory.connect(kept.database) as history:
        history.open_run("full", attempt=2**32 - 1)
    for number in range(3):
        kept.spool.add_end(run(number, "full" if number == 1 else "job"), outcome(9))
    kept.spool.add_events("stream", [event(0) | {"task": "full"}, event(1)])
    assert kept.replay().marks == {Mark.REJECTED: 2}
    assert [one.attempt for one in kept.runs()] == [1, 2]
    assert len(kept.runs("told")) == 1


def test_file_of_another_version_is_left(kept_sqlite: Kept, caplog: pytest.LogCaptureFixture) -> None:
    kept_sqlite.add(0, 1)
    [path] = kept_sqlite.files
    path.write_bytes(path.read_bytes().replace(b'{"spool": 1', b'{"spool": 2'))
    assert kept_sqlite.replay().left == [path]
    assert path.exists()
    assert len(caplog.records) == 1


def test_files_are_their_owners_only(kept_sqlite: Kept, state: Path) -> None:
    kept_sqlite.add(0, 1)
    kept_sqlite.replay()
    kept_sqlite.add(0, 1)
    paths = list((state / "spool").iterdir())
    assert {path.suffix for path in paths} == {".jsonl", ".lock"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert stat.S_IMODE((state / "spool").stat().st_mode) == 0o700
    [path] = kept_sqlite.files
    key, made, pid = path.stem.split("-")
    assert (len(key), int(pid)) == (16, os.getpid())
    assert abs(int(made) / 1e9 - datetime.now(UTC).timestamp()) < 300
    assert lines(path)[0]["spool"] == 1


def test_place_is_that_of_the_variable_the_unit_or_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert spool.directory() == Path(os.environ["TASKRUNS_STATE_DIR"]) / "spool"
    monkeypatch.delenv("TASKRUNS_STATE_DIR")
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/unit:{tmp_path}/other")
    assert spool.directory() == tmp_path / "unit/taskruns/spool"
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert spool.directory() == tmp_path / "taskruns/spool"


def test_password_is_in_no_file_and_changes_no_key() -> None:
    urls = [make_url(f"postgresql+psycopg://me:{word}@host/name?sslpassword={word}") for word in ("secret1", "secret2")]
    for url in urls:
        Spool(url).add_events("stream", [event(0)])
    paths = spool.files(urls[0])
    assert len(paths) == 2
    assert paths == spool.files(urls[1])
    assert b"secret" not in b"".join(path.read_bytes() for path in paths)
    assert lines(paths[0])[0]["db"] == "postgresql://host/name"
    assert paths == spool.files(urls[0].set(drivername="postgresql+asyncpg"))
    assert paths == spool.files(make_url("postgresql://other@host:5432/name?connect_timeout=3"))
    assert spool.files(make_url("postgresql://me@host:5433/name")) == []


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_database_in_memory_has_no_spool(url: str) -> None:
    with pytest.raises(OSError, match="in memory"):
        Spool(parse_url(url)).add_start(run(0))
    assert spool.files(parse_url(url)) == []


def test_spool_is_bounded_but_for_ends_of_its_starts(kept_sqlite: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    one = kept_sqlite.spool.add_start(run(0))
    monkeypatch.setattr(spool, "MAX_FILE", 300)
    content = kept_sqlite.files[0].read_bytes()
    for _ in range(2):
        with pytest.raises(OSError, match="the spool of this process is full"):
            kept_sqlite.spool.add_start(run(1))
    assert kept_sqlite.files[0].read_bytes() == content
    kept_sqlite.spool.add_end(one, outcome(1))
    kept_sqlite.add(2, 3)  # into another file
    assert len(kept_sqlite.files) == 2
    monkeypatch.setattr(spool, "MAX_ALL", 1000)
    with pytest.raises(OSError, match="the spool of this database is full"):
        kept_sqlite.spool.add_end(run(2), outcome(3), attempt=1)
    kept_sqlite.replay()
    kept_sqlite.add(4, 5)


@pytest.mark.parametrize("is_new", [True, False])
def test_disk_that_fails_leaves_the_file_as_it_was(
    kept_sqlite: Kept, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    if not is_new:
        kept_sqlite.add(0, 1)
    before = [path.read_bytes() for path in kept_sqlite.files]

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            kept_sqlite.spool.add_start(run(5))
    assert [path.read_bytes() for path in kept_sqlite.files] == before
    kept_sqlite.add(6, 7)
    kept_sqlite.replay()
    assert [fact[2] for fact in kept_sqlite.facts()] == ([6] if is_new else [0, 6])


def test_full_disk_loses_no_more_than_what_was_refused(
    kept_sqlite: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=False).returncode:
        pytest.skip("mounting is not permitted")
    try:
        monkeypatch.setenv("TASKRUNS_STATE_DIR", str(tmp_path))
        count = 0
        with contextlib.suppress(OSError):
            while count < 1000:
                kept_sqlite.spool.add_end(run(count), outcome(count + 1, TaskPhase.FAILED, error="x" * 3000))
                count += 1
        assert 10 < count < 1000
        assert kept_sqlite.replay().marks == {}
        assert [fact[2] for fact in kept_sqlite.facts()] == list(range(count))
        kept_sqlite.add(0, 1)
        kept_sqlite.replay()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_start_is_taken_back(kept_sqlite: Kept) -> None:
    one = kept_sqlite.spool.add_start(run(0))
    kept_sqlite.spool.forget(one)
    assert kept_sqlite.files == []
    kept_sqlite.add(1, 2)
    [path] = kept_sqlite.files
    before = path.read_bytes()
    one = kept_sqlite.spool.add_start(run(3))
    kept_sqlite.spool.forget(one)
    kept_sqlite.spool.forget(one)
    assert path.read_bytes() == before
    one, two = kept_sqlite.spool.add_start(run(4)), kept_sqlite.spool.add_start(run(5))
    kept_sqlite.spool.forget(one)
    kept_sqlite.spool.add_end(two, outcome(6))
    with TaskRunHistory.connect(kept_sqlite.database, source="here") as history:
        history.open_run("job", started_at=one.started_at)
    kept_sqlite.replay()
    assert kept_sqlite.facts() == [(1, "running", 4, None), (2, "succeeded", 1, 2), (3, "succeeded", 5, 6)]


def test_fork_has_a_file_of_its_own(kept_sqlite: Kept) -> None:
    one = kept_sqlite.spool.add_start(run(0))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        kept_sqlite.add(1, 2)
        os.write(writer, b"1")
        signal.pause()
        os._exit(1)
    try:
        os.read(reader, 1)
        assert len(kept_sqlite.files) == 2
        assert [waiting.is_alive for waiting in spool.waiting()] == [True, False]
        kept_sqlite.spool.add_end(one, outcome(3))
        kept_sqlite.replay()  # the child lives, and holds nothing of its parent's
        assert [fact[2] for fact in kept_sqlite.facts()] == [0, 1]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_threads_share_a_spool(kept_sqlite: Kept) -> None:
    def work(number: int) -> None:
        for place in range(20):
            one = kept_sqlite.spool.add_start(run(place, f"task {number}"))
            kept_sqlite.spool.add_end(one, outcome(place + 1))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        kept_sqlite.replay()
    kept_sqlite.replay()
    for number in range(4):
        runs = kept_sqlite.runs(f"task {number}")
        assert [one.started_at for one in runs] == [FROM + timedelta(seconds=place) for place in range(20)]
        assert {one.phase for one in runs} == {TaskPhase.SUCCEEDED}
    assert kept_sqlite.files == []


def test_go_that_runs_out_of_time_is_gone_on_with(kept_sqlite: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "_LINES_OF_RUNS", 3)
    die_with_open_start(kept_sqlite.database)
    for number in range(10, 15):
        kept_sqlite.add(number, number + 1)
    goes: list[Replayed] = []
    while not goes or not goes[-1].is_complete:
        goes.append(kept_sqlite.replay(seconds=0))
    assert [go.events for go in goes] == [3, 3, 3, 3, 1, 0]
    assert [fact[2] for fact in kept_sqlite.facts()] == [0, 2, *range(10, 15)]
    assert kept_sqlite.runs()[1].recovered
    assert {path.suffix for path in spool.directory().iterdir()} == {".lock"}


def test_only_one_replays(kept_sqlite: Kept) -> None:
    kept_sqlite.add(0, 1)
    with spool.replay_lock(kept_sqlite.url, wait=False) as is_ours:
        assert is_ours
        assert kept_sqlite.replay() == Replayed(is_complete=False)
        assert kept_sqlite.runs() == []
    assert kept_sqlite.replay().events == 2


def test_database_that_fails_leaves_all_for_the_next_time(kept: Kept) -> None:
    from sqlalchemy import text

    kept.add(0, 1)
    with kept.engine.connect() as connection:
        connection.execute(text("ALTER TABLE task_runs RENAME TO gone"))
        connection.commit()
        before = [path.read_bytes() for path in kept.files]
        with pytest.raises(Exception, match="task_runs"):
            kept.replay()
        assert [path.read_bytes() for path in kept.files] == before
        connection.execute(text("ALTER TABLE gone RENAME TO task_runs"))
        connection.commit()
    assert kept.replay().events == 2


REPLAYING = (
    "import sys; from taskruns import engine; from taskruns.url import parse_url; from taskruns import replay\n"
    "replay._LINES = replay._LINES_OF_RUNS = 7; url = parse_url(sys.argv[1]); print(flush=True)\n"
    "print(replay.replay(engine.create(url), url, wait=len(sys.argv) > 2))"
)


def replayer(kept: Kept, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", REPLAYING, kept.database, *arguments], stdout=subprocess.PIPE)


def expect(kept: Kept, count: int) -> None:
    """Add many runs that begin, end, and are told."""
    with TaskRunHistory.connect(kept.database, source="here") as history:
        opened = [
            history.open_run(f"task {number % 3}", started_at=FROM + timedelta(seconds=number))
            for number in range(0, count, 4)
        ]
    pending = []
    for number in range(count):
        task, ended = f"task {number % 3}", outcome(number + 0.5, TaskPhase.FAILED, error=f"{number}")
        if number % 4 == 0:
            kept.spool.add_end(opened[number // 4], ended, attempt=opened[number // 4].attempt)
        else:
            pending.append((kept.spool.add_start(run(number, task)), ended))
        if len(pending) > 5:
            kept.spool.add_end(*pending.pop(0))
        if number % 10 == 0:
            told = event(number, attempt=number // 10 + 1)
            kept.spool.add_events("stream", [told, told | {"kind": "TaskStopped"}])
    for one in pending:
        kept.spool.add_end(*one)


def assert_each_is_there_once(kept: Kept, count: int) -> None:
    for task in range(3):
        runs = kept.runs(f"task {task}")
        found = {one.started_at: (one.finished_at, one.error) for one in runs}
        assert found == {
            FROM + timedelta(seconds=number): (FROM + timedelta(seconds=number + 0.5), f"{number}")
            for number in range(count)
            if number % 3 == task
        }
        assert [one.attempt for one in runs] == list(range(1, len(found) + 1))
    assert [one.phase.value for one in kept.runs("told")] == ["succeeded"] * -(-count // 10)


def test_killed_replays_lose_and_double_nothing(kept: Kept) -> None:
    count = 120
    expect(kept, count)
    [path] = kept.files
    content = path.read_bytes()
    chance = random.Random(8)
    for _ in range(4):
        path.write_bytes(content)  # as if one that came to its end had been killed just before
        process = replayer(kept)
        assert process.stdout is not None
        process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.random() * 0.1)
        process.kill()
        process.communicate()
    kept.replay()
    assert_each_is_there_once(kept, count)
    assert kept.files == []


def test_replayers_at_once_share_the_work(kept: Kept) -> None:
    expect(kept, 80)
    processes = [replayer(kept, "wait") for _ in range(3)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert_each_is_there_once(kept, 80)


def test_command_replays(home: Home, sqlite: str) -> None:
    kept = Kept(sqlite)
    kept.add(0, 1)
    done = home.taskruns("--db", sqlite, "replay")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 events of 1 files replayed\n", "")
    living = kept.spool.add_start(run(2))
    done = home.taskruns("replay", "--db", sqlite, "--json")
    assert json.loads(done.stdout) == {
        "events": 0,
        "files": 0,
        "pruned": 0,
        "contradicted": 0,
        "rejected": 0,
        "left": [str(kept.files[0])],
    }
    assert "living process" in home.taskruns("replay", "--db", sqlite).stderr
    kept.spool.add_end(living, outcome(3))
    assert home.taskruns("replay", "--db", sqlite).stdout == "2 events of 1 files replayed\n"
    assert home.taskruns("replay", "--db", sqlite).stdout == "0 events of 0 files replayed\n"


def test_command_says_that_the_database_cannot_be_used(home: Home, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/no/runs.db"
    Kept(database).add(0, 1)
    (tmp_path / "no").write_bytes(b"")
    done = home.taskruns("replay", "--db", database)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_run_closed_otherwise_meanwhile_stays(kept_sqlite: Kept) -> None:
    kept_sqlite.add(0, 1)
    [path] = kept_sqlite.files
    content = path.read_bytes()
    kept_sqlite.replay()
    with TaskRunHistory.connect(kept_sqlite.database) as history, pytest.raises(RunClosedError):
        history.close_run("job", 1, TaskPhase.FAILED, error="late")
    path.write_bytes(content.replace(b"TaskStopped", b"TaskCanceled"))
    assert kept_sqlite.replay().marks == {Mark.CONTRADICTED: 1}
    assert kept_sqlite.facts() == [(1, "succeeded", 0, 1)]
