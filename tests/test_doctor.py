"""`taskruns doctor`: every finding, each provoked for real."""

import json
import os
import pwd
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Answer, Home, Shell
from servers import missing, own_directory
from sqlalchemy import create_engine, make_url, text
from watchers import register

from taskruns import TaskPhase, TaskRunHistory, spool
from taskruns.cli import crontab, doctor, storage
from taskruns.liveness import Process
from taskruns.schema import SCHEMA_VERSION
from taskruns.spool import Spool
from taskruns.url import parse_url

Finding = dict[str, str | None]
OTHER = 65534


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def shell(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    home.path.mkdir()
    return Shell(home, monkeypatch, capsys)


def parsed(answer: Answer) -> list[Finding]:
    found: list[Finding] = [json.loads(line) for line in answer.out.splitlines()]
    assert answer.err == ""
    assert answer.status == any(finding["status"] == "problem" for finding in found)
    for finding in found:
        assert list(finding) == ["check", "status", "message", "advice"]
    return found


def examined(shell: Shell, *arguments: str) -> list[Finding]:
    return parsed(shell("doctor", "--json", *arguments))


def the(found: list[Finding], check: str) -> Finding:
    (finding,) = [finding for finding in found if finding["check"] == check]
    return finding


def problems(found: list[Finding]) -> list[str | None]:
    return [finding["check"] for finding in found if finding["status"] == "problem"]


def execute(url: str, *statements: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def path_of(url: str) -> Path:
    return Path(str(make_url(url).database))


def ago(**span: float) -> datetime:
    return datetime.now(UTC) - timedelta(**span)


def test_healthy_database_has_no_problem(shell: Shell, kind: str, database: str) -> None:
    with TaskRunHistory.connect(database) as history:
        history.close_run("job", history.open_run("job").attempt, TaskPhase.SUCCEEDED)
        history.open_run("other")
    found = examined(shell, "--db", database)
    assert problems(found) == []
    assert the(found, "tables") == {
        "check": "tables",
        "status": "ok",
        "message": f"version {SCHEMA_VERSION}",
        "advice": None,
    }
    assert re.fullmatch(
        r"1 run is active, the oldest since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", the(found, "active")["message"] or ""
    )
    assert "runs of 2 tasks, the oldest of 2" in (the(found, "runs")["message"] or "")
    if kind == "sqlite":
        assert re.fullmatch(r"\d+ kB, 0 B of them free", the(found, "size")["message"] or "")
        assert {"place", "permissions", "writable", "space", "sqlite"} <= {finding["check"] for finding in found}
    else:
        name = {"postgresql": "PostgreSQL", "mariadb": "MariaDB"}[kind]
        assert re.match(rf"{name} \d+\.\d+", the(found, "reachable")["message"] or "")
        assert the(found, "driver")["status"] == "ok"


def test_people_get_a_line_for_each_finding(shell: Shell, sqlite: str) -> None:
    path_of(sqlite).chmod(0o640)
    answer = shell("doctor", "--db", sqlite)
    assert (answer.status, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert len(lines) == len(examined(shell, "--db", sqlite))
    assert all(re.match(r"(ok|note|problem) +\S+ +\S", line) for line in lines)
    assert len({len(re.match(r"\S+ +\S+ +", line)[0]) for line in lines}) == 1  # type: ignore[index]  # it matches
    assert f"its group may read it; unless that is meant, `chmod 600 {path_of(sqlite)}`" in answer.out
    assert "\x1b" not in answer.out


def test_nothing_is_made_or_changed(shell: Shell, home: Home) -> None:
    found = examined(shell)
    path = home.path / ".local/share/taskruns/taskruns.db"
    assert the(found, "database")["message"] == f"sqlite+pysqlite:///{path} (the default)"
    assert the(found, "file")["status"] == "note"
    assert problems(found) == []
    assert list(home.path.iterdir()) == []


def test_other_places_that_name_a_database_are_told(
    shell: Shell, home: Home, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, system = home.path / ".config/taskruns/config.toml", home.path / "etc/taskruns.toml"
    for path in (user, system):
        path.parent.mkdir(parents=True)
    user.write_text('db = "postgresql://u:geheim@host/x"\n')
    system.write_text("db = 5\n")
    default = home.path / ".local/share/taskruns/taskruns.db"
    default.parent.mkdir(parents=True)
    default.touch()
    monkeypatch.setenv("TASKRUNS_DB", sqlite)
    found = examined(shell)
    assert "(TASKRUNS_DB)" in (the(found, "database")["message"] or "")
    overruled = [finding for finding in found if finding["check"] == "configuration"]
    assert {finding["status"] for finding in overruled} == {"note"}
    messages = [finding["message"] or "" for finding in overruled]
    assert all(message.endswith(" TASKRUNS_DB comes first") for message in messages)
    parts = (f"{user} names postgresql+psycopg://u:***@", f"{system}: ", str(default))
    for message, part in zip(messages, parts, strict=True):
        assert part in message


@pytest.mark.parametrize("text", ["db = [", "db = 5", 'db_file = "none"', 'db = "oracle://u:geheim@host/x"'])
def test_broken_configuration_is_a_problem(shell: Shell, home: Home, text: str) -> None:
    path = home.path / ".config/taskruns/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found = examined(shell)
    assert problems(found) == ["configuration"]
    assert str(path) in (the(found, "configuration")["message"] or "")
    assert "database" not in {finding["check"] for finding in found}  # commands do not go on to the next place
    assert "geheim" not in json.dumps(found)


def test_missing_home_directory_is_a_problem(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("TASKRUNS_STATE_DIR")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    assert problems(examined(shell)) == ["configuration", "state"]
    assert problems(examined(shell, "--db", "/srv/x.db")) == ["state"]


@pytest.mark.parametrize(
    ("url", "check", "message"),
    [
        ("postgresql://u:geheim@127.0.0.1:1/x", "reachable", "refused"),
        ("mysql://u:geheim@127.0.0.1:1/x", "reachable", "refused"),
        ("postgresql://u:geheim@host:port/x", "configuration", "not valid"),
        ("postgresql://127.0.0.1:1/x?no_such_option=1", "reachable", "no_such_option"),
        ("mysql://127.0.0.1:1/x?no_such_option=1", "reachable", "no_such_option"),
        ("sqlite:///x?synchronous=often", "reachable", "synchronous"),
        ("mysql+nosuch://u:geheim@127.0.0.1:1/x", "reachable", "nosuch"),
        ("sqlite://", "file", "memory"),
        ("sqlite:////", "file", "not a file"),
        ("/etc/passwd/x.db", "writable", "not a directory"),
    ],
)
def test_database_that_cannot_be_used_is_a_problem(shell: Shell, url: str, check: str, message: str) -> None:
    found = examined(shell, "--db", url)
    assert check in problems(found)
    assert message in (next(one for one in found if one["status"] == "problem")["message"] or "")
    assert "geheim" not in json.dumps(found)


def test_wrong_user_is_a_problem(shell: Shell, mariadb: str) -> None:
    url = make_url(mariadb).set(username="nobody_here", password="geheim")
    found = examined(shell, "--db", url.render_as_string(hide_password=False))
    assert problems(found) == ["reachable"]
    assert "Access denied" in (the(found, "reachable")["message"] or "")
    assert "geheim" not in json.dumps(found)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:gehe%69m@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?user=u&password=geheim",
        "postgresql://127.0.0.1:1/x?sslpassword=geheim",
        "mysql://127.0.0.1:1/x?password=geheim&password=geheim",
        "mysql://127.0.0.1:1/x?ssl_key_password=geheim",
        "oracle://u:geheim@host/x",
        "://u:geheim@host",
        "sqlite://u:geheim@host/x",
    ],
)
def test_passwords_are_never_printed(shell: Shell, url: str) -> None:
    for arguments in ((), ("--json",)):
        answer = shell("doctor", "--db", url, *arguments)
        assert answer.status == 1
        assert "geheim" not in answer.out + answer.err


def test_missing_driver_names_the_extra(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymysql", None)
    found = examined(shell, "--db", "mysql://127.0.0.1:1/x")
    assert problems(found) == ["driver"]
    assert the(found, "driver")["advice"] == "pip install 'taskruns[mysql]'"


def test_server_that_hangs_is_a_problem(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = examined(shell, "--db", f"mysql://127.0.0.1:{silent.getsockname()[1]}/x")
        assert problems(found) == ["reachable"]
        assert "no answer" in (the(found, "reachable")["message"] or "")
    for thread in threading.enumerate():
        if thread.name == "taskruns-doctor":
            thread.join(10)


def test_fault_of_the_program_is_not_hidden(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Iterator[object]:
        raise ZeroDivisionError
        yield

    monkeypatch.setattr(doctor, "OF_DATABASE", (broken,))
    with pytest.raises(ZeroDivisionError):
        shell("doctor")


def test_missing_tables_are_a_problem_on_a_server(shell: Shell, kind: str, empty_database: str) -> None:
    if kind == "sqlite":
        sqlite3.connect(path_of(empty_database)).executescript("CREATE TABLE x (y)").connection.close()
    found = examined(shell, "--db", empty_database)
    assert problems(found) == ([] if kind == "sqlite" else ["tables"])
    assert the(found, "tables")["status"] == ("note" if kind == "sqlite" else "problem")
    assert "`taskruns db upgrade`" in (the(found, "tables")["advice"] or "")


@pytest.mark.parametrize(("version", "status"), [("1_0000", "note"), ("2_0001", "problem"), ("1_0099", "ok")])
def test_version_of_the_tables(shell: Shell, sqlite: str, version: str, status: str) -> None:
    execute(sqlite, f"UPDATE taskruns_version SET version_num = '{version}'")
    found = the(examined(shell, "--db", sqlite), "tables")
    assert found["status"] == status
    assert version in (found["message"] or "")
    assert (found["advice"] is None) == (status == "ok")


def test_tables_that_differ_are_noted(shell: Shell, database: str) -> None:
    migrated = "ALTER TABLE task_runs ADD COLUMN novel INTEGER", "ALTER TABLE task_runs DROP COLUMN novel"
    execute(database, migrated[0])
    try:
        found = examined(shell, "--db", database)
    finally:
        execute(database, migrated[1])
    assert problems(found) == []
    (differing,) = [finding for finding in found if finding["check"] == "tables" and finding["status"] == "note"]
    assert "novel" in (differing["message"] or "")
    assert differing["advice"] == "see `taskruns db check`"


def test_runs_that_are_old_are_noted(shell: Shell, database: str) -> None:
    with TaskRunHistory.connect(database) as history:
        history.open_run("active", started_at=ago(days=900))
        history.open_run("active too", started_at=ago(hours=1))
        run = history.open_run("old", started_at=ago(days=399))
        history.close_run("old", run.attempt, TaskPhase.FAILED, finished_at=ago(days=399))
        found = examined(shell, "--db", database)
        assert the(found, "active")["status"] == "note"
        assert f"2 runs are active, the oldest since {ago(days=900):%Y-%m-%d}" in (
            the(found, "active")["message"] or ""
        )
        assert "pruning" not in {finding["check"] for finding in found}
        run = history.open_run("older", started_at=ago(days=402))
        history.close_run("older", run.attempt, TaskPhase.FAILED, finished_at=ago(days=401))
    found = examined(shell, "--db", database)
    assert "nothing prunes this database" in (the(found, "pruning")["message"] or "")
    assert "`taskruns prune`" in (the(found, "pruning")["advice"] or "")
    assert problems(found) == []


def test_tasks_are_counted_up_to_a_limit(shell: Shell, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MANY_TASKS", 2)
    with TaskRunHistory.connect(sqlite) as history:
        for task in "abc":
            history.open_run(task)
    assert "runs of more than 2 tasks" in (the(examined(shell, "--db", sqlite), "runs")["message"] or "")


def test_file_that_is_no_database_is_a_problem(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_text("once upon a time there was a text " * 100)
    path.chmod(0o600)
    found = examined(shell, "--db", str(path))
    assert problems(found) == ["reachable"]
    assert "not a database" in (the(found, "reachable")["message"] or "")


def test_locked_file_is_a_problem(shell: Shell, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskruns.engine.CONNECT_TIMEOUT", 0.1)
    execute(sqlite, "PRAGMA journal_mode = DELETE")
    holder = sqlite3.connect(path_of(sqlite))
    holder.execute("BEGIN EXCLUSIVE")
    found = examined(shell, "--db", sqlite)
    holder.close()
    assert problems(found) == ["reachable"]
    assert "locked" in (the(found, "reachable")["message"] or "")


def test_journal_mode_and_free_pages_are_noted(shell: Shell, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(sqlite, "PRAGMA journal_mode = DELETE")
    monkeypatch.setattr(doctor, "MUCH_FREE", 1000)
    execute(sqlite, "CREATE TABLE x (y)", "INSERT INTO x VALUES (randomblob(1000000))", "DROP TABLE x")
    found = examined(shell, "--db", sqlite)
    assert the(found, "journal")["status"] == "note"
    assert the(found, "size")["status"] == "note"
    assert "--compact" in (the(found, "size")["advice"] or "")


def test_file_and_directory_that_others_may_write(shell: Shell, sqlite: str, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    path = folder / "x.db"
    shutil.copy(path_of(sqlite), path)
    for mode, told in ((0o600, "mode 0600"), (0o640, "its group may read"), (0o666, "everybody may write")):
        path.chmod(mode)
        found = examined(shell, "--db", str(path))
        assert told in (the(found, "permissions")["message"] or "")
        assert the(found, "permissions")["status"] == ("ok" if mode == 0o600 else "note")
        assert problems(found) == []
    folder.chmod(0o777)
    assert problems(examined(shell, "--db", str(path))) == ["permissions"]
    folder.chmod(0o1777)
    assert problems(examined(shell, "--db", str(path))) == []


AS_USER = """
import os, sys
from taskruns.cli import run
user, *paths = sys.argv[1:]
run(["--db", paths[0], "doctor"])  # all modules are loaded, which the user may not be able to read
os.setgroups([]); os.setgid(int(user)); os.setuid(int(user))
for path in paths:
    print("---")
    print("---", run(["--db", path, "doctor", "--json"]))
"""


def as_user(home: Path, *paths: Path) -> list[list[Finding]]:
    """Return what some user without any right of root is told of databases."""
    if os.geteuid() != 0:
        missing("only root may become another user")
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, str(OTHER), *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HOME": str(home)},
    )
    assert done.stderr == ""
    answers = re.findall(r"^---\n(.*?)^--- (\d)$", done.stdout, re.MULTILINE | re.DOTALL)
    return [parsed(Answer(int(status), out, "")) for out, status in answers]


def test_user_who_may_not_write_is_told_so(sqlite: str) -> None:
    with own_directory("root") as folder:
        folder.chmod(0o755)

        def made(name: str, mode: int, file_mode: int) -> Path:
            path = folder / name / "x.db"
            path.parent.mkdir()
            shutil.copy(path_of(sqlite), path)
            path.chmod(file_mode)
            path.parent.chmod(mode)
            return path

        file, directory = made("a", 0o777, 0o644), made("b", 0o755, 0o666)
        log, hidden = made("c", 0o777, 0o666).with_name("x.db-wal"), made("d", 0o700, 0o666)
        log.touch(0o600)  # as root leaves it
        found = as_user(folder, file, directory, log.with_name("x.db"), hidden)
    for one, told in zip(
        found,
        (
            ("writable", f"may not write {file}, which is root's"),
            ("writable", f"may not make files in {directory.parent}, which is root's"),
            ("writable", f"may not write {log}, which is root's"),
            ("file", "Permission denied"),
        ),
        strict=True,
    ):
        check, message = told
        assert {"state", check} <= set(problems(one))
        assert message in " ".join(finding["message"] or "" for finding in one if finding["check"] == check)
        assert "journal" not in {finding["check"] for finding in one}


def test_state_directory(shell: Shell, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> Finding:
        return the(examined(shell), "state")

    monkeypatch.delenv("TASKRUNS_STATE_DIR")
    assert state()["message"] == f"{home.path}/.local/state/taskruns/spool can be made"
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/a:{tmp_path}/b")
    assert state()["message"] == f"{tmp_path}/a/taskruns/spool can be made"
    monkeypatch.setenv("TASKRUNS_STATE_DIR", str(tmp_path))
    (tmp_path / "spool").mkdir()
    assert state() == {"check": "state", "status": "ok", "message": f"{tmp_path}/spool is writable", "advice": None}
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TASKRUNS_STATE_DIR", str(file / "x"))
    assert state()["status"] == "problem"
    assert "TASKRUNS_STATE_DIR" in (state()["advice"] or "")


def test_library_with_the_wal_reset_bug(shell: Shell, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = [(3, 44, 6), (3, 50, 7), (3, 50, 8), (3, 51, 3), (3, 52, 0), (4, 0, 0)]
    broken = [(3, 40, 1), (3, 44, 5), (3, 45, 0), (3, 50, 6), (3, 51, 2)]
    for library in fixed + broken:
        assert doctor.has_wal_reset_bug(library) == (library in broken)
    for library, status in (((3, 51, 2), "note"), ((3, 51, 3), "ok")):
        monkeypatch.setattr("sqlite3.sqlite_version_info", library)
        found = examined(shell, "--db", sqlite)
        assert the(found, "sqlite")["status"] == status
        assert problems(found) == []


MOUNTED = """
set -e
mount -t tmpfs -o size=32m none "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" none "$1/root"
mount --rbind /proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
touch "$1/root/.dockerenv"
mkdir "$1/root/vol ume"
mount -t tmpfs none "$1/root/vol ume"
exec chroot "$1/root" "$2" doctor --json --db "$3"
"""


@pytest.mark.parametrize(
    ("path", "told"),
    [("/srv/data/x.db", ("problem", "container's own layer")), ("/vol ume/x.db", ("note", "in memory (tmpfs at /vol"))],
)
def test_layer_of_a_container_and_memory_are_told(tmp_path: Path, path: str, told: tuple[str, str]) -> None:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        missing("no unshare, or not root")
    environment = {**os.environ, "HOME": "/root"}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", MOUNTED, "sh", str(tmp_path), Home.program, path],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr}")
    found = parsed(Answer(done.returncode, done.stdout, done.stderr))
    assert the(found, "place")["status"] == told[0]
    assert told[1] in (the(found, "place")["message"] or "")
    # The small disk of the layer is full enough to be told too.
    assert ("space" in problems(found)) == (path == "/srv/data/x.db")


MOUNTS = r"""22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:40 / /srv/nfs rw shared:1 master:2 - nfs4 server:/x rw
24 23 0:41 / /srv/nfs/local rw - xfs /dev/sdb rw
25 22 0:42 / /srv/a\040b rw - fuse.sshfs user@host:/ rw
26 22 0:43 / /srv/over rw - ext4 /dev/sdc rw
27 26 0:44 / /srv/over rw - cifs //server/share rw
"""


@pytest.mark.parametrize(
    ("path", "mount", "kind"),
    [
        ("/srv/x.db", "/", "ext4"),
        ("/srv/nfs", "/srv/nfs", "nfs4"),
        ("/srv/nfs/a/x.db", "/srv/nfs", "nfs4"),
        ("/srv/nfsx/x.db", "/", "ext4"),
        ("/srv/nfs/local/x.db", "/srv/nfs/local", "xfs"),
        ("/srv/a b/x.db", "/srv/a b", "fuse.sshfs"),
        ("/srv/over/x.db", "/srv/over", "cifs"),
    ],
)
def test_network_file_system_is_a_problem(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, path: str, mount: str, kind: str
) -> None:
    # There is no network file system here: what the kernel says of one is what can be had.
    monkeypatch.setattr(storage, "mountinfo", lambda: MOUNTS)
    assert storage.mount_of(Path(path)) == (Path(mount), kind)
    found = examined(shell, "--db", path)
    assert ("place" in problems(found)) == (kind in ("nfs4", "cifs", "fuse.sshfs"))
    assert kind in (the(found, "place")["message"] or "")


def test_link_is_followed_to_where_the_file_lies(shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "mountinfo", lambda: MOUNTS)
    (tmp_path / "link").symlink_to("/srv/nfs")
    assert "place" in problems(examined(shell, "--db", f"{tmp_path}/link/x.db"))


@pytest.mark.parametrize("inside", [True, False])
def test_layers_matter_as_the_root_of_a_container(shell: Shell, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    mounts = "1 0 0:1 / / rw - overlay none rw\n2 1 0:2 / /srv/layer rw - overlay none rw\n"
    monkeypatch.setattr(storage, "mountinfo", lambda: mounts)
    monkeypatch.setattr(storage, "in_container", lambda: inside)
    assert ("place" in problems(examined(shell, "--db", "/srv/x.db"))) == inside
    assert "place" not in problems(examined(shell, "--db", "/srv/layer/x.db"))


def test_temporary_files_are_noted(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "mountinfo", lambda: MOUNTS)
    place = the(examined(shell, "--db", "/var/tmp/x.db"), "place")
    assert (place["status"], "temporary" in (place["message"] or "")) == ("note", True)


def test_disk_that_is_full_is_a_problem(shell: Shell, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LEAST_FREE", 1 << 60)
    found = examined(shell, "--db", sqlite)
    assert problems(found) == ["space"]
    assert re.match(r"the disk has only \d+(\.\d)? [MG]B left", the(found, "space")["message"] or "")


def test_system_without_mountinfo_says_nothing(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "mountinfo", lambda: "")
    assert "place" not in {finding["check"] for finding in examined(shell, "--db", "/srv/x.db")}


def test_wrong_usage_is_2(shell: Shell) -> None:
    for wrong in (("doctor", "x"), ("doctor", "--nothing")):
        answer = shell(*wrong)
        assert (answer.status, answer.out, len(answer.err.splitlines())) == (2, "", 1)


@pytest.fixture
def account(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the user's home in the password file, too."""
    own = SimpleNamespace(pw_dir=str(home.path), pw_name=pwd.getpwuid(os.getuid()).pw_name)
    monkeypatch.setattr(crontab, "account", lambda: own)


def run_by_cron(line: str, home: Home, command: str = "true") -> "subprocess.CompletedProcess[str]":
    """Run a crontab's line as cron does."""
    schedule = re.match(r"(\S+ ){5}", line)
    assert schedule is not None
    asked, *given = re.split(r"(?<!\\)%", line[schedule.end() :])
    assert not given
    asked = asked.replace(r"\%", "%").replace("/path/to/backup", command)
    bare = {"HOME": str(home.path), "LOGNAME": "me", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        ["/bin/sh", "-c", asked], env=bare, cwd=home.path, capture_output=True, text=True, check=False
    )


def line_of(answer: Answer) -> str:
    return answer.out.splitlines()[-1]


def test_line_for_cron_records_into_the_same_database(
    shell: Shell, home: Home, account: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home.path / "it's 100% mine" / "runs.db"
    monkeypatch.setenv("TASKRUNS_DB", str(path))
    answer = shell("doctor", "--cron")
    assert (answer.status, answer.err) == (1, "")
    assert "another one: TASKRUNS_DB is set here and not under cron" in answer.out
    assert f"{home.path}/.local/share/taskruns/taskruns.db (the default)" in answer.out
    done = run_by_cron(line_of(answer), home)
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = home.runs("backup", f"sqlite:///{path}")
    assert run.phase == "succeeded"


def test_database_that_cron_finds_too_needs_no_option(shell: Shell, home: Home, account: None) -> None:
    config = home.path / ".config/taskruns/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('db = "~/own.db"\n')
    found = parsed(shell("doctor", "--cron", "--json"))
    assert problems(found) == []
    assert the(found, "cron")["message"] == f"under cron: sqlite+pysqlite:///{home.path}/own.db ({config}), the same"
    line = the(found, "crontab")["message"] or ""
    assert line == f"15 2 * * * {shlex.join(crontab.program())} exec backup -- /path/to/backup"
    assert run_by_cron(line, home).returncode == 0
    assert len(home.runs("backup", f"sqlite:///{home.path}/own.db")) == 1


def test_option_goes_into_the_line_as_an_absolute_path(
    shell: Shell, home: Home, account: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = shell("doctor", "--cron", "--db", "here.db")
    assert answer.status == 0
    assert f" --db {tmp_path}/here.db exec backup -- " in line_of(answer)


@pytest.mark.parametrize("by", ["--db", "TASKRUNS_DB"])
def test_password_is_not_for_the_crontab(shell: Shell, account: None, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    url = "postgresql://u:geheim@127.0.0.1:1/x"
    if by == "TASKRUNS_DB":
        monkeypatch.setenv("TASKRUNS_DB", url)
    answer = shell("doctor", "--cron", *(("--db", url) if by == "--db" else ()))
    assert answer.status == 1
    assert f"{by} is " in answer.out
    assert "`db_file = " in answer.out
    assert "--db" not in line_of(answer)
    assert "geheim" not in answer.out + answer.err


def test_problem_that_only_cron_has_is_told(shell: Shell, home: Home, account: None) -> None:
    config = home.path / ".config/taskruns/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("db = 5")
    found = parsed(shell("doctor", "--cron", "--json", "--db", "postgresql://127.0.0.1:1/x"))
    assert problems(found) == ["cron: reachable"]
    assert problems(parsed(shell("doctor", "--cron", "--json"))) == ["database"]


def test_program_that_does_not_start_under_cron_is_a_problem(
    shell: Shell, account: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(crontab, "program", lambda: [str(tmp_path / "taskruns")])
    found = parsed(shell("doctor", "--cron", "--json"))
    assert problems(found) == ["cron"]
    assert "not found" in (the(found, "cron")["message"] or "")


def test_home_that_cron_has_otherwise(
    shell: Shell, home: Home, account: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "another"))  # as after `sudo -E`
    answer = shell("doctor", "--cron")
    assert answer.status == 1
    assert f"another one: HOME is {home.path} there" in answer.out
    assert f" --db {tmp_path}/another/.local/share/taskruns/taskruns.db " in line_of(answer)
    shutil.rmtree(home.path)
    found = parsed(shell("doctor", "--cron", "--json"))
    assert problems(found) == ["cron"]
    assert str(home.path) in (the(found, "cron")["message"] or "")


def test_program_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "bin" / "taskruns"
    own.parent.mkdir()
    own.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bin/taskruns"])
    assert crontab.program() == [str(own)]
    monkeypatch.setattr(sys, "argv", ["/x/taskruns/__main__.py"])
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    assert crontab.program() == [str(own)]
    own.unlink()
    assert crontab.program() == [str(own.with_name("python")), "-m", "taskruns"]


def test_what_is_kept_in_the_spool_is_a_problem(shell: Shell, sqlite: str) -> None:
    event = {"kind": "TaskStarting", "task": "job", "attempt": 1, "at": "2026-03-01T00:00:00Z"}
    url = parse_url(sqlite)
    Spool(url).add_events("stream", [event, event])
    Spool(parse_url("postgresql://me:geheim@elsewhere/name")).add_events("stream", [event])
    (path,) = spool.files(url)
    found = examined(shell, "--db", sqlite)
    assert problems(found) == ["spool"]
    own, other = (finding for finding in found if finding["check"] == "spool")
    assert (own["message"] or "").startswith("2 events not in the database yet, since 20")
    assert "taskruns replay" in (own["advice"] or "")
    assert other["message"] == "something is kept for another database: postgresql://elsewhere/name"
    path.rename(path.with_suffix(".rejected"))
    rejected = next(finding for finding in examined(shell, "--db", sqlite) if finding["status"] == "problem")
    assert str(path.with_suffix(".rejected")) in (rejected["message"] or "")


def test_runs_whose_process_is_gone_are_a_problem(shell: Shell, database: str) -> None:
    register(database, Process("elsewhere", "another boot", 1, 77, 1), "job", silent=61)
    found = examined(shell, "--db", database)
    assert problems(found) == ["supervisors"]
    assert the(found, "supervisors")["message"] == "1 run is active whose process is gone: elsewhere:77"
    assert the(found, "supervisors")["advice"] == "run `taskruns recover`"


@pytest.mark.parametrize(("policy", "status", "said"), [("off", "note", "without end"), ("keep=7", "ok", "keep=7")])
def test_retention_of_the_default_database_is_told(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, policy: str, status: str, said: str
) -> None:
    monkeypatch.setenv("TASKRUNS_RETENTION", policy)
    finding = the(examined(shell), "retention")
    assert finding["status"] == status
    assert said in (finding["message"] or "")
