"""Runs the code blocks of the documents as tests."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from taskruns import TaskRunHistory

PROGRAMS = str(Path(sys.executable).parent)


def run(command: str, environment: dict[str, str] | None = None, shell: str = "bash") -> str:
    done = subprocess.run(
        [shell, "-euc", command], capture_output=True, text=True, env=environment, check=False, timeout=60
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stderr + done.stdout


def evaluate_shell(example: Example) -> None:
    run("taskruns exec backup -- true\n" + example.parsed)


def evaluate_console(example: Example) -> None:
    for session in re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)[1:]:
        command, _, expected = session.partition("\n")
        assert shape(run(command).replace(socket.gethostname(), "web-1")) == shape(expected)


def shape(output: str) -> str:
    """Return output without what differs from run to run."""
    output = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", output)
    output = re.sub(r"\d+\.\d+ s", "SPAN", output)
    return "\n".join(" ".join(line.split()) for line in output.splitlines())


def evaluate_cron(example: Example) -> None:
    """Run a crontab's line as cron does: its sh, its environment, its idea of a per cent sign."""
    for line in example.parsed.splitlines():
        command = line.split(maxsplit=5)[5]
        assert not re.search(r"(?<!\\)%", command)
        command = command.replace(r"\%", "%").replace("/usr/local/bin", PROGRAMS)
        bare = {"HOME": os.environ["HOME"], "LOGNAME": "root", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}
        run(command, bare, shell="/bin/sh")
        assert "succeeded" in run(f"{PROGRAMS}/taskruns last backup", bare)


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a directory with a database that is ready, and nothing of the surroundings."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("TASKRUNS_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", PROGRAMS, prepend=os.pathsep)
    with TaskRunHistory.connect("sqlite:///runs.db") as history:
        history.upgrade()


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser(language="sh", evaluator=evaluate_shell),
        CodeBlockParser(language="console", evaluator=evaluate_console),
        CodeBlockParser(language="cron", evaluator=evaluate_cron),
    ],
    patterns=["README.md", "docs/*.md"],
    fixtures=["own_home"],
).pytest()
