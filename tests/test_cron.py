"""`taskruns exec` under a real cron daemon. Needs root, and takes the minute that cron takes."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Home

pytestmark = pytest.mark.soak


def crontab() -> str | None:
    """Return what root has as a crontab."""
    done = subprocess.run(["crontab", "-l"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def set_crontab(content: str | None) -> None:
    if content is None:
        subprocess.run(["crontab", "-r"], capture_output=True, check=False)
    else:
        subprocess.run(["crontab", "-"], input=content, text=True, check=True)


@pytest.fixture
def cron() -> Iterator[None]:
    """A cron daemon."""
    program = shutil.which("cron", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or os.geteuid() != 0:
        pytest.skip("no cron, or not root")
    before = crontab()
    daemon = subprocess.Popen([program, "-f"], stdin=subprocess.DEVNULL)
    time.sleep(1)
    if daemon.poll() is not None:
        pytest.skip(f"cron does not start, status {daemon.returncode}: perhaps another one runs")
    try:
        yield
    finally:
        set_crontab(before)
        daemon.terminate()
        daemon.wait(10)


def test_line_of_a_crontab_is_recorded_and_read_by_the_same_user(cron: None, tmp_path: Path) -> None:
    home = Home(tmp_path)
    said = tmp_path / "said"
    # cron sets HOME from the password file, unless the crontab does.
    lines = [f"HOME={tmp_path}"]
    if "PYTHONPATH" in os.environ:
        lines.append(f"PYTHONPATH={os.environ['PYTHONPATH']}")
    script = r"""date "+percent=\%Y"; env; echo oops >&2; exit 3"""
    lines.append(f"* * * * * {home.program} exec nightly -- sh -c '{script}' >{said} 2>&1; echo status=$? >>{said}")
    set_crontab("\n".join(lines) + "\n")
    deadline = time.monotonic() + 80
    while not (said.exists() and "status=" in said.read_text()):
        assert time.monotonic() < deadline, "cron did not run the line"
        time.sleep(0.5)
    set_crontab(None)
    answer = said.read_text().splitlines()
    assert f"percent={time.strftime('%Y')}" in answer
    assert "oops" in answer
    assert answer[-1] == "status=3"
    names = {line.partition("=")[0] for line in answer} - {"percent", "status", "oops"}
    own = {"TASKRUNS_TASK", "TASKRUNS_ATTEMPT", "TASKRUNS_TRY"}
    # What Debian's cron gives, and what sh adds: no locale, and none that we have brought.
    assert own <= names <= own | {"HOME", "LOGNAME", "PATH", "SHELL", "PWD", "PYTHONPATH", "_", "LANG"}
    (run, *_) = home.runs("nightly")
    assert (run.phase, run.exit_code, run.error) == ("failed", 3, "oops")
    done = home.taskruns("last", "nightly", "--json", env={"HOME": str(tmp_path), **kept()})
    assert '"phase": "failed"' in done.stdout
    assert home.taskruns("last", "nightly").stdout.count("oops") == 1


def kept() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
