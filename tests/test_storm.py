"""Far more wrappers at once than the server has connections."""

import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import psycopg
import pytest
from commands import Home
from sqlalchemy import make_url

pytestmark = pytest.mark.soak

COUNT = 400
SECONDS = 20


def memory(pid: int) -> tuple[int, int]:
    """Return the resident memory of a process, and what of that is its alone, in KiB."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", rollup, re.MULTILINE)}
    return sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def is_waiting(wrapper: "subprocess.Popen[str]") -> bool:
    """Whether the wrapper's command runs."""
    try:
        return bool(Path(f"/proc/{wrapper.pid}/task/{wrapper.pid}/children").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_four_hundred_commands_at_once(postgresql: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Home(tmp_path)
    home.environment["TASKRUNS_DB"] = postgresql
    plain = make_url(postgresql).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        limit = int(connection.execute("SHOW max_connections").fetchone()[0])  # type: ignore[index]  # there is a row
        assert limit <= 100, f"the server takes {limit} connections: this would show nothing"
        began = time.monotonic()
        command = ("--", "sleep", str(SECONDS))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        wrappers = [home.start("exec", f"storm {number % 7}", *command, **pipes) for number in range(COUNT)]
        started = time.monotonic() - began
        held = 0
        sizes: dict[int, tuple[int, int]] = {}
        try:
            while any(wrapper.poll() is None for wrapper in wrappers):
                (connections,) = connection.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                ).fetchone() or (0,)
                held = max(held, connections)
                if len(sizes) < 20:
                    # Never do all wait: the first have ended before the last have begun.
                    sizes |= {wrapper.pid: memory(wrapper.pid) for wrapper in wrappers if is_waiting(wrapper)}
                assert time.monotonic() - began < 600
                time.sleep(0.2)
        finally:
            for wrapper in wrappers:
                wrapper.terminate()
        seconds = time.monotonic() - began
        said = [(wrapper.returncode, *wrapper.communicate()) for wrapper in wrappers]
        runs = connection.execute(
            "SELECT phase, exit_code, count(*), min(finished_at - started_at), max(finished_at - started_at)"
            " FROM task_runs WHERE task_id LIKE 'storm %' GROUP BY phase, exit_code"
        ).fetchall()
    rss, own = sorted(sizes.values())[len(sizes) // 2]
    figures = [
        f"{COUNT} wrappers started within {started:.1f} s, ended within {seconds:.1f} s",
        f"connections at most: {held} of {limit}; runs: {runs}",
        f"a waiting wrapper (median of {len(sizes)}): RSS {rss / 1024:.1f} MiB, its alone {own / 1024:.1f} MiB",
    ]
    with capsys.disabled():
        print("", *figures, sep="\n")
    assert Counter(said) == {(0, "", ""): COUNT}
    ((phase, code, count, shortest, longest),) = runs
    assert (phase, code, count) == ("succeeded", 0, COUNT)
    assert shortest.total_seconds() >= SECONDS
    assert longest.total_seconds() < SECONDS + 60
    for number in range(7):
        attempts = [run.attempt for run in home.runs(f"storm {number}", postgresql)]
        assert attempts == list(range(1, len(attempts) + 1))
