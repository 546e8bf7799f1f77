"""What cron makes of a command: its environment, and the line that it wants."""

import json
import os
import pwd
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import click

from taskruns.cli.discovery import Database
from taskruns.cli.finding import Finding, Findings
from taskruns.url import hide_password, is_file

PATIENCE = 60.0
"""Seconds for which the examination from cron's place may take."""


def examine(option: str | None) -> Findings:
    """Look at what cron finds, and end with a line for the crontab."""
    try:
        here = Database.find(option)
    except click.ClickException as error:
        yield Finding("database", "problem", error.format_message(), "correct it: see `taskruns doctor`")
        return
    yield Finding("database", "ok", f"{here} ({here.named_by})")
    named = [] if option is None or _is_secret(here) else ["--db", _text(here)]
    own = account()
    environment = {"HOME": own.pw_dir, "LOGNAME": own.pw_name, "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
    try:
        done = run(shlex.join([*program(), *named, "doctor", "--json"]), environment)
        there = [Finding(**json.loads(line)) for line in done.stdout.splitlines()]
    except (OSError, ValueError, TypeError, subprocess.TimeoutExpired) as error:
        yield Finding("cron", "problem", f"`taskruns doctor` does not work under cron: {error}")
        return
    if not there:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        yield Finding("cron", "problem", f"`taskruns doctor` does not work under cron: {said}")
        return
    found = next((finding.message for finding in there if finding.check == "database"), "no database")
    is_same = found.rpartition(" (")[0] == str(here)
    if is_same:
        yield Finding("cron", "ok", f"under cron: {found}, the same")
    else:
        yield Finding(
            "cron", "problem", f"under cron: {found}, another one: {_reasons(option, environment)}", _advice(here)
        )
        named = [] if _is_secret(here) else ["--db", _text(here)]
    for finding in there:
        if finding.status == "problem":
            yield Finding(f"cron: {finding.check}", "problem", finding.message, finding.advice)
    yield Finding("crontab", "ok", line([*program(), *named, "exec", "backup", "--", "/path/to/backup"]))


def account() -> pwd.struct_passwd:
    """Return this user's line of the password file, from which cron has HOME, whatever it is here."""
    return pwd.getpwuid(os.getuid())


def run(command: str, environment: Mapping[str, str]) -> "CompletedProcess[str]":
    """Run a command as cron does: by its shell, at home, with nothing to read and hardly an environment."""
    return subprocess.run(  # noqa: S603  (the command is our own)
        ["/bin/sh", "-c", command],
        env=environment,
        cwd=environment["HOME"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def program() -> list[str]:
    """Return how to start this taskruns from anywhere."""
    for candidate in (Path(sys.argv[0]), Path(sys.executable).with_name("taskruns")):
        if candidate.name == "taskruns" and os.access(candidate, os.X_OK) and candidate.is_file():
            return [str(candidate.absolute())]
    return [sys.executable, "-m", "taskruns"]


def line(command: Sequence[str]) -> str:
    """Return a crontab's line; a bare ``%`` would be the end of the command there."""
    return f"15 2 * * * {shlex.join(command)}".replace("%", r"\%")


def _text(database: Database) -> str:
    if is_file(database.url) and not database.url.query:
        return str(database.url.database)
    return database.url.render_as_string(hide_password=False)


def _is_secret(database: Database) -> bool:
    return hide_password(database.url) != database.url.render_as_string(hide_password=False)


def _reasons(option: str | None, environment: Mapping[str, str]) -> str:
    """Say what names a database here and not there."""
    if option is not None:
        return "--db is given here"
    names = [name for name in sorted(os.environ) if re.match("TASKRUNS_DB$|XDG_(CONFIG|DATA)_HOME$", name)]
    reasons = [f"{name} is set here and not under cron" for name in names]
    if os.environ.get("HOME", environment["HOME"]) != environment["HOME"]:
        reasons.append(f"HOME is {environment['HOME']} there")
    return ", ".join(reasons) or "its configuration is another one"


def _advice(database: Database) -> str:
    if _is_secret(database):
        return (
            "a password does not belong in a crontab: put the URL into a file that only you can read, and "
            '`db_file = "FILE"` into ~/.config/taskruns/config.toml'
        )
    return "use the line below, or put `db` into ~/.config/taskruns/config.toml"
