"""Which database the command line uses, and what it says of one that it cannot use."""

from pathlib import Path

import pytest
from commands import Home, Shell
from sqlalchemy import URL

from taskruns import TaskRunHistory


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    home.path.mkdir()
    return Shell(home, monkeypatch, capsys)


def make(path: Path, task: str = "job") -> None:
    """Make a database with a run of a task."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TaskRunHistory.connect(URL.create("sqlite", database=str(path))) as history:
        history.upgrade()
        history.open_run(task)


def where(shell: Shell, *arguments: str) -> str:
    answer = shell(*arguments, "db", "where")
    assert (answer.status, answer.err) == (0, "")
    return answer.out.rstrip("\n")


def config(home: Home, text: str) -> Path:
    path = home.path / ".config" / "taskruns" / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def system_config(home: Home, text: str) -> Path:
    path = home.path / "etc" / "taskruns.toml"  # see Shell
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_first_named_is_used(shell: Shell, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    default = f"sqlite+pysqlite:///{home.path}/.local/share/taskruns/taskruns.db (the default)"
    assert where(shell) == default
    system = system_config(home, 'db = "/srv/system.db"\n')
    assert where(shell) == f"sqlite+pysqlite:////srv/system.db ({system})"
    user = config(home, "")
    assert where(shell) == f"sqlite+pysqlite:////srv/system.db ({system})"
    user = config(home, 'db = "sqlite:////srv/user.db"\n')
    assert where(shell) == f"sqlite+pysqlite:////srv/user.db ({user})"
    monkeypatch.setenv("TASKRUNS_DB", "/srv/variable.db")
    assert where(shell) == "sqlite+pysqlite:////srv/variable.db (TASKRUNS_DB)"
    assert where(shell, "--db", "/srv/option.db") == "sqlite+pysqlite:////srv/option.db (--db)"
    monkeypatch.setenv("TASKRUNS_DB", "")
    assert where(shell) == f"sqlite+pysqlite:////srv/user.db ({user})"


def test_option_may_stand_before_and_after_the_command(shell: Shell, tmp_path: Path) -> None:
    make(tmp_path / "a.db", "in a")
    make(tmp_path / "b.db", "in b")
    a, b = f"sqlite:///{tmp_path}/a.db", str(tmp_path / "b.db")
    assert "in a" in shell("--db", a, "tasks").out
    assert "in b" in shell("tasks", "--db", b).out
    assert "in b" in shell("--db", a, "tasks", "--db", b).out
    assert shell("db", "--db", b, "where").out.startswith(f"sqlite+pysqlite:///{b}")
    assert shell("db", "where", "--db", b).out.startswith(f"sqlite+pysqlite:///{b}")


def test_plain_path_may_be_relative_or_begin_with_a_tilde(
    shell: Shell, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs%20 #?é.db")
    assert shell("runs", "job", "--db", "runs%20 #?é.db").status == 0
    assert where(shell, "--db", "~/x.db") == f"sqlite+pysqlite:///{home.path}/x.db (--db)"


def test_user_configuration_follows_xdg(
    shell: Shell, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(home, 'db = "/srv/home.db"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg" / "taskruns").mkdir(parents=True)
    (tmp_path / "xdg" / "taskruns" / "config.toml").write_text('db = "/srv/xdg.db"\n')
    assert "/srv/xdg.db" in where(shell)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert str(tmp_path / "data" / "taskruns" / "taskruns.db") in where(shell)


@pytest.mark.parametrize("place", ["absolute", "relative", "home"])
def test_file_that_holds_the_url(shell: Shell, home: Home, place: str) -> None:
    named = {"absolute": str(home.path / "url"), "relative": "url", "home": "~/url"}[place]
    path = config(home, f'db_file = "{named}"\n')
    file = path.parent / "url" if place == "relative" else home.path / "url"
    file.write_text("\npostgresql://u:geheim@db.example/runs\n\n")
    assert where(shell) == f"postgresql+psycopg://u:***@db.example/runs ({path})"
    config(home, f'db = "/srv/first.db"\ndb_file = "{named}"\n')
    assert "/srv/first.db" in where(shell)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("db = [", "cannot be read: "),
        ("db = 5", "db is a text"),
        ('db = ["/x.db"]', "db is a text"),
        ("db_file = 5", "cannot be read: "),
        ('db_file = "none"', "No such file or directory"),
        ('db_file = "/etc/passwd/none"', "Not a directory"),
        ('db_file = "/"', "cannot be read: "),
        ('db = "oracle://u:geheim@host/x"', "'oracle' is not a supported database"),
        ('db = "postgresql://u:geheim@host:x/y"', "the database URL is not valid"),
        ('db = ""', ""),
        ('db_file = "empty"', ""),
        ("\udcff", "cannot be read: "),
    ],
)
@pytest.mark.parametrize("name", ["user", "system"])
def test_broken_configuration_is_named_in_one_line(
    shell: Shell, home: Home, text: str, message: str, name: str
) -> None:
    path = (config if name == "user" else system_config)(home, "")
    path.write_bytes(text.encode(errors="surrogateescape"))
    (path.parent / "empty").write_text("\n")
    answer = shell("db", "where")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith(f"taskruns: {path}")
    assert message in answer.err
    assert len(answer.err.splitlines()) == 1
    assert "geheim" not in answer.err


def test_configuration_that_is_a_directory_is_said(shell: Shell, home: Home) -> None:
    (home.path / ".config" / "taskruns" / "config.toml").mkdir(parents=True)
    answer = shell("db", "where")
    assert answer.status == 2
    assert "config.toml cannot be read: " in answer.err


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:geheim@host/x",
        "postgresql://u:gehe%69m@host/x",
        "postgresql://host/x?user=u&password=geheim",
        "postgresql://host/x?sslpassword=geheim&application_name=a",
        "mysql://u:geheim@host/x?charset=utf8mb4",
        "mysql://host/x?passwd=geheim",
        "mysql://host/x?password=geheim&password=geheim",
        "mysql://host/x?ssl_key_password=geheim",
        "postgresql://host/x?PASSWORD=geheim",
    ],
)
@pytest.mark.parametrize("command", [("db", "where"), ("db", "upgrade"), ("db", "current")])
@pytest.mark.filterwarnings("ignore:'passwd' is deprecated:DeprecationWarning")
def test_passwords_are_never_printed(shell: Shell, url: str, command: tuple[str, ...]) -> None:
    url = url.replace("//host", "//127.0.0.1:1").replace("@host", "@127.0.0.1:1")
    answer = shell(*command, "--db", url)
    assert answer.status == (0 if command == ("db", "where") else 2)
    assert answer.out + answer.err
    assert "geheim" not in answer.out + answer.err


@pytest.mark.parametrize(
    "named",
    [
        "postgresql://u:geheim@host:port/x",
        "oracle://u:geheim@host/x",
        "://u:geheim@host",
        "postgresql://u:geheim@127.0.0.1:1/x?password=geheim",
        "postgresql+nosuch://u:geheim@127.0.0.1:1/x",
        "sqlite://u:geheim@host/x",
        "sqlite:///x?synchronous=geheim",
        "postgresql://127.0.0.1:1/x?prepare_threshold=some",
        "postgresql://127.0.0.1:1/x?no_such_option=geheim",
        "mysql://127.0.0.1:1/x?no_such_option=geheim",
        "a\0b",
    ],
)
def test_url_that_cannot_be_used_is_one_line_and_2(shell: Shell, named: str) -> None:
    answer = shell("tasks", "--db", named)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("taskruns: ")
    assert len(answer.err.splitlines()) == 1
    assert "geheim" not in answer.err.replace("no_such_option=geheim", "").replace("synchronous=geheim", "").replace(
        "'GEHEIM'", ""
    )
