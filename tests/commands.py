"""`taskruns` as its user runs it, with a home of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from taskruns import TaskRun, TaskRunHistory
from taskruns.cli import run


class Home:
    """A user's home directory: nothing of the surroundings names a database."""

    program = str(Path(sys.executable).with_name("taskruns"))

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name == "TASKRUNS_STATE_DIR" or not name.startswith(("TASKRUNS_", "XDG_"))
        }
        self.environment["HOME"] = str(path)
        self.database = f"sqlite:///{path}/.local/share/taskruns/taskruns.db"

    def taskruns(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run it to its end."""
        command = [self.program, *arguments]
        if not {"stdout", "stderr"} & options.keys():
            options["capture_output"] = True
        defaults: dict[str, Any] = {"env": self.environment, "text": True, "check": False, "timeout": 60}
        if "input" not in options:
            defaults["stdin"] = subprocess.DEVNULL
        return subprocess.run(command, **(defaults | options))  # noqa: PLW1510  (check is among them)

    def start(self, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
        """Start it."""
        defaults: dict[str, Any] = {"env": self.environment, "stdin": subprocess.DEVNULL}
        return subprocess.Popen([self.program, *arguments], **(defaults | options))

    def runs(self, task: str, database: str | None = None) -> list[TaskRun]:
        """Return the task's runs, oldest first."""
        with TaskRunHistory.connect(database or self.database, read_only=True) as history:
            return list(history.iter_runs(task))[::-1]


@dataclass(frozen=True)
class Answer:
    """What a call of the command line left behind."""

    status: int
    out: str
    err: str


class Shell:
    """Calls the command line in this process, in the surroundings of a home: far quicker than a process of its own."""

    def __init__(self, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        for name in [name for name in os.environ if name not in home.environment]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(home.path))
        monkeypatch.setattr("taskruns.cli.discovery.SYSTEM_CONFIG", home.path / "etc" / "taskruns.toml")

    def __call__(self, *arguments: str) -> Answer:
        self._capsys.readouterr()
        status = run(arguments)
        out, err = self._capsys.readouterr()
        return Answer(status, out, err)
