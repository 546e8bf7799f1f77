"""Which database is meant, and opening it for a command."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from sqlalchemy import URL

from taskruns.errors import SchemaVersionError
from taskruns.history import TaskRunHistory
from taskruns.retention import EMBEDDED, Retention
from taskruns.url import hide_password, is_file, parse_name, parse_url

F = TypeVar("F", bound=Callable[..., Any])

SYSTEM_CONFIG = Path("/etc/taskruns.toml")

DEFAULT = "the default"


@dataclass(frozen=True, slots=True)
class Database:
    """A database and what names it."""

    url: URL
    named_by: str
    retention: Retention | None = None
    """The policy that it keeps up by itself: only the default file, which nobody has named, has one."""

    @property
    def is_default(self) -> bool:
        """Whether it is the file that nobody has named."""
        return self.named_by == DEFAULT

    @classmethod
    def find(cls, option: str | None) -> "Database":
        """Return the database that is meant: the option, else TASKRUNS_DB, a configuration file, the default file.

        Never a file in the working directory: cron has none to speak of.
        """
        for by, ask in places(option):
            if (named := ask()) is not None:
                return cls.named(named, by)
        return cls.default()

    @classmethod
    def named(cls, name: str, by: str) -> "Database":
        """Return the database of this URL or path."""
        return cls(_parse(name, by), by)

    @classmethod
    def default(cls) -> "Database":
        """Return the file that is used where nothing else is named."""
        from platformdirs import user_data_path  # noqa: PLC0415  (only where it is asked for)

        default = user_data_path("taskruns") / "taskruns.db"
        return cls(parse_url(URL.create("sqlite", database=str(default))), DEFAULT, configured_retention(EMBEDDED))

    def __str__(self) -> str:
        return hide_password(self.url)

    def reading(self) -> TaskRunHistory:
        """Open the history to read it; nothing is created or changed."""
        self.require()
        with self.options_checked(), ExitStack() as opened:
            history = opened.enter_context(TaskRunHistory.connect(self.url, read_only=True, retry_for=1.0))
            history.check_version()  # the first connection, where drivers find what they cannot use
            opened.pop_all()
        return history

    def looking_after(self) -> TaskRunHistory:
        """Open the history to change what is there: its tables are upgraded where needed, but none are made."""
        self.require()
        with self.options_checked():
            history = TaskRunHistory.connect(self.url)
            try:
                history.check_version()
            except SchemaVersionError as error:
                if error.found is None:
                    raise
                history.prepare()
        return history

    @contextmanager
    def options_checked(self) -> Iterator[None]:
        """Blame the URL for the errors that drivers raise about an option that they do not know."""
        try:
            yield
        except (TypeError, ValueError, AttributeError) as error:
            raise click.ClickException(f"the database URL ({self.named_by}) cannot be used: {error}") from None

    def require(self) -> None:
        """Check that the file of an SQLite database is there."""
        if is_file(self.url) and not Path(self.url.database or "").is_file():
            advice = "; the first `taskruns exec` makes it" if self.is_default else ""
            raise click.ClickException(f"no such database: {self.url.database} (named by {self.named_by}){advice}")


def places(option: str | None) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Yield what may name a database, the first one first, each with how to ask it."""
    yield "--db", lambda: option
    yield "TASKRUNS_DB", lambda: os.environ.get("TASKRUNS_DB") or None
    for path in (user_config(), SYSTEM_CONFIG):
        yield str(path), partial(_configured, path)


def user_config() -> Path:
    """Return the path of the user's configuration file."""
    home = os.environ.get("XDG_CONFIG_HOME")
    try:
        return (Path(home) if home else Path("~/.config").expanduser()) / "taskruns" / "config.toml"
    except RuntimeError:
        raise click.ClickException("there is no home directory: name the database by --db or TASKRUNS_DB") from None


def configured_retention(default: Retention | None) -> Retention | None:
    """Return the policy of TASKRUNS_RETENTION, else of a configuration file, else ``default``; None if that is off."""
    text, by = os.environ.get("TASKRUNS_RETENTION"), "TASKRUNS_RETENTION"
    for path in (user_config(), SYSTEM_CONFIG):
        if not text:
            text, by = _settings(path).get("retention"), str(path)
    if not text:
        return default
    try:
        return Retention.parse(text)
    except (ValueError, AttributeError) as error:
        why = error if isinstance(text, str) else 'it is a text, such as retention = "succeeded=30d, keep=5"'
        raise click.ClickException(f"{by}: retention: {why}") from None


def _settings(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        import tomllib  # noqa: PLC0415  (only where there is something to read)

        return tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{path} cannot be read: {error}") from None


def _configured(path: Path) -> str | None:
    try:
        settings = _settings(path)
        if "db_file" in settings and "db" not in settings:
            file = path.parent / Path(settings["db_file"]).expanduser()
            return _from_its_folder(file.read_text(encoding="utf-8").strip(), path)
        named = settings.get("db")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise click.ClickException(f"{path}: db_file: {error.strerror}: {error.filename}") from None
    except (OSError, ValueError, TypeError) as error:
        raise click.ClickException(f"{path} cannot be read: {error}") from None
    if named is not None and not isinstance(named, str):
        raise click.ClickException(f'{path}: db is a text, such as db = "postgresql://host/name"')
    return None if named is None else _from_its_folder(named, path)


def _from_its_folder(named: str, path: Path) -> str:
    """Return what a configuration file says; a path there starts at the file, not at the working directory."""
    is_path = ":" not in named and named.strip()
    return str(path.parent / Path(named).expanduser()) if is_path else named


def _parse(named: str, by: str) -> URL:
    try:
        return parse_name(named)
    except ValueError as error:
        raise click.ClickException(f"{by}: {error}") from None


def db_option(command: F) -> F:
    """Let ``--db`` stand after the command's name too."""

    def keep(context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.find_root().obj = value

    return click.option("--db", metavar="URL", expose_value=False, callback=keep, help="The database.")(command)


def database() -> Database:
    """Return the database that the running command means."""
    return Database.find(click.get_current_context().find_root().obj)
