"""Runs the code blocks of the documents as tests."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

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


@pytest.fixture(scope="module")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stand in an empty directory, with a user's data of one's own; a document's blocks share it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name in [name for name in os.environ if name.startswith(("TASKRUNS_", "XDG_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("PATH", PROGRAMS, prepend=os.pathsep)
        yield


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".md":  # its blocks build on each other
            item.add_marker(pytest.mark.xdist_group(item.path.name))


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
