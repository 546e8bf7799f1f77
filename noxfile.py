import shutil
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "types", "tests", "coverage", "wheel"]
nox.options.default_venv_backend = "venv"

PYPROJECT = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, group: str, *, package: bool = True) -> None:
    groups = nox.project.dependency_groups(PYPROJECT, group)
    session.install("-q", *(["-e", ".[postgres,mysql,asyncio,plot]"] if package else []), *groups)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on SQLite, PostgreSQL and MariaDB; more workers than processors, as tests wait much."""
    install(session, "tests")
    session.run("pytest", "-n", "4", "--dist", "worksteal", "-m", "not soak", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Find what no test reaches; apart from the tests, as it doubles the work of every process they start."""
    install(session, "tests")
    # Other users, whose files it cannot write; waits; repeats.
    apart = ("readers", "exec_outage", "outages", "races", "pgbouncer")
    # Another user again, and a process that ends by a function which coverage replaces by one that cannot be pickled.
    alone = ("doctor.py::test_user_who_may_not_write_is_told_so", "transfer.py::test_a_process_that_dies_is_noticed")
    ignored = [f"--ignore=tests/test_{name}.py" for name in apart]
    ignored += [f"--deselect=tests/test_{test}" for test in alone]
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "-n", "3", "-m", "not soak", *ignored, *session.posargs)
    session.run("coverage", "combine", "-q")
    session.run("coverage", "report")


@nox.session
def soak(session: nox.Session) -> None:
    """Run what is large: many kills, races and processes. By hand."""
    install(session, "tests")
    session.run("pytest", "-m", "soak", "-s", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and the arrows between the modules."""
    install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", "--no-cache")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types."""
    install(session, "types")
    session.run("mypy")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel and use it away from the repository; then run the README's first command in a copy of it."""
    install(session, "wheel", package=False)
    root = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "-q", "--outdir", folder)
        built = next(Path(folder).glob("*.whl"))
        session.run("python", "-m", "pip", "install", "-q", "--force-reinstall", str(built))
        home = {"HOME": folder, "XDG_DATA_HOME": None, "XDG_CONFIG_HOME": None, "TASKRUNS_DB": None}
        session.chdir(folder)
        session.run("taskruns", "exec", "smoke", "--", "python", "-c", "print('recorded')", env=home)
        session.run("taskruns", "db", "check", env=home)
        session.run("taskruns", "last", "smoke", "--phase", "succeeded", "--json", env=home)
        session.run("taskruns", "--db", "postgresql://host/name", "db", "upgrade", "--sql", env=home, silent=True)
        copy = Path(folder) / "copy"
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".*"))
        session.chdir(copy)
        readme = (copy / "README.md").read_text(encoding="utf-8")
        command = next(line for line in readme.splitlines() if "taskruns exec" in line and "pip install" in line)
        session.run("sh", "-c", command, external=True, env=home)
