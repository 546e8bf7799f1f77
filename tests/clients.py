"""The statements of docs/sql.md, and the databases' own clients to run them."""

import os
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

from servers import missing
from sqlalchemy import make_url

DOCUMENT = Path(__file__).parents[1] / "docs/sql.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(re.findall(r"```sql ([\w ]+)\n(.*?)```", TEXT, re.DOTALL))
PROGRAMS = {"sqlite": "sqlite3", "postgresql": "psql", "mariadb": "mariadb"}


class RefusedError(Exception):
    """What the client said on its standard error."""


def of_time(moment: datetime, kind: str) -> str:
    """Return a time as the document has it written."""
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f") + ("+00" if kind == "postgresql" else "")


class Client:
    """A database's own client: a process for each script."""

    def __init__(self, kind: str, url: str) -> None:
        self.kind = kind
        self.url = url
        # Debian's psql is a script in Perl that looks for the one in these places, and takes thrice as long.
        places = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
        program = shutil.which(PROGRAMS[kind], path=os.pathsep.join([*places, os.environ["PATH"]]))
        if program is None:
            missing(f"no {PROGRAMS[kind]} to run the statements of docs/sql.md")
        parsed = make_url(url)
        self._environment = os.environ | {"PGTZ": "Asia/Kolkata"}
        if kind == "sqlite":
            self._command = [program, "-batch", "-bail", "-init", os.devnull, str(parsed.database)]
        elif kind == "postgresql":
            plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
            self._command = [program, "-XqAt", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose", plain]
        else:
            self._environment["MYSQL_PWD"] = parsed.password or ""
            where = [f"--host={parsed.host}", f"--port={parsed.port or 3306}", f"--user={parsed.username}"]
            # A client and a server that are set up badly: the document has to make up for it.
            bad = ["--default-character-set=latin1", "--init-command=SET sql_mode = '', time_zone = '+05:30'"]
            options = ["--no-defaults", "--protocol=tcp", *bad, "-NB"]
            self._command = [program, *options, *where, str(parsed.database)]

    def statement(self, name: str) -> str:
        """Return a block of the document, for this database."""
        statement = BLOCKS.get(f"{self.kind} {name}") or BLOCKS[name]
        if name in BLOCKS and self.kind == "postgresql":
            statement = re.sub(r"@(\w+)", r":'\1'", statement)
        return statement

    def run(self, *names: str, **values: Any) -> list[str]:
        """Run blocks of the document, or other SQL, with their placeholders set; return the lines of the answer."""
        written = [name if name.endswith(";") else self.statement(name) for name in names]
        script = "\n".join([*self._set(values), *written])
        session = BLOCKS.get(f"{self.kind} session", "")
        arguments = self._variables(values) if self.kind == "postgresql" else []
        done = subprocess.run(
            [*self._command[:-1], *arguments, self._command[-1]],
            input=session + script,
            capture_output=True,
            encoding="utf-8",
            env=self._environment,
            check=False,
            timeout=60,
        )
        if done.returncode:
            raise RefusedError(done.stderr)
        assert not done.stderr
        lines = [line for line in done.stdout.splitlines() if line]
        if self.kind == "sqlite":
            assert lines.pop(0) == "30000"  # what PRAGMA busy_timeout has set
        return lines

    def _plain(self, value: Any) -> Any:
        return of_time(value, self.kind) if isinstance(value, datetime) else value

    def _variables(self, values: dict[str, Any]) -> list[str]:
        names = dict.fromkeys(("started_at", "finished_at", "error", "exit_code", "source"), "") | values
        texts = {name: "" if value is None else self._plain(value) for name, value in names.items()}
        return [argument for name, value in texts.items() for argument in ("-v", f"{name}={value}")]

    def _set(self, values: dict[str, Any]) -> list[str]:
        def quoted(value: Any) -> str:
            value = self._plain(value)
            if not isinstance(value, str):
                return "NULL" if value is None else str(value)
            if self.kind == "mariadb":
                return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
            value = value.replace("'", "''").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            return f"\"'{value}'\""

        if self.kind == "postgresql":
            return []
        form = {"sqlite": ".parameter set @{} {}", "mariadb": "SET @{} = {};"}[self.kind]
        return [form.format(name, quoted(value)) for name, value in values.items()]

    def open(self, task: str, **values: Any) -> int:
        """Open a run as the document says; try again, under the lock where there is one."""
        values = {"task": task, "source": "shell"} | values
        for _ in range(50):
            scripts = [["open"]]
            if self.kind == "postgresql":
                scripts.append(["BEGIN;", "lock", "open", "COMMIT;"])
            elif self.kind == "mariadb":
                scripts.append(["lock", "open", "unlock"])
            for script in scripts:
                try:
                    answer = self.run(*script, **values)
                except RefusedError as error:
                    if self.kind != "mariadb" or not re.match(r"ERROR (1062|1213) ", str(error)):
                        raise
                    continue
                if len(script) > 1 and self.kind == "mariadb":
                    assert answer.pop(0) == "1"
                if answer:
                    return int(answer[0])
        raise AssertionError("no number in 50 tries")

    def close(self, task: str, attempt: int, phase: str, **values: Any) -> bool:
        """Close a run as the document says; tell whether a row was changed."""
        values = {"error": None, "exit_code": None} | values
        answer = self.run("close", task=task, attempt=attempt, phase=phase, **values)
        return answer == ["1"] if self.kind == "mariadb" else bool(answer)
