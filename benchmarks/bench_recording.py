"""How fast runs are recorded, durably: taskruns, the raw driver, a naive ORM and other libraries, side by side.

    python benchmarks/bench_recording.py [--postgresql URL] [--mariadb URL] [--peers] [--luigi PYTHON]
        [--shapes one threads tasks processes one-name growth] [--slow-disk MICROSECONDS] [--directory DIR]
        [--repeats 5] [--seconds 1.0] [--databases PART ...] [--only PART ...] [--growth-rows 10000000]

What is counted are pairs of an open and a close. A repeat takes a sample of each contender, in random order and on new
tables, and ratios are those of one repeat to the raw driver's. Without options it is SQLite in a temporary directory:
give one on the disk that is to be measured. ``growth`` makes a history as bench_queries.py does, and keeps it.

``--peers`` needs requirements-peers.txt beside taskruns, ``--luigi`` the python of an environment of its own with
requirements-luigi.txt. A slow disk needs a C compiler and, for PostgreSQL, its programs: each sync takes longer there.
"""

import argparse
import os
import platform
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import growth
import slow_disk
from contenders import Raw, Taskruns, TaskrunsGrouped, has_group_commit, of_shape
from databases import Database, server_database, sqlite_databases
from peers import Celery, Dbos, Luigi
from shapes import SHAPES, TITLES, Contender, Sample
from tables import RAW, Taken, print_summary, print_table
from targets import print_targets

from taskruns import TaskRunHistory

PEERS_IN = {"SQLite FULL", "PostgreSQL"}
LIBRARIES = ("SQLAlchemy", "psycopg", "PyMySQL", "aiosqlite", "celery", "dbos")


def parsed() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgresql", help="the URL of a database from which others can be made")
    parser.add_argument("--mariadb", help="likewise")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a sample takes")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "growth"], default=list(SHAPES))
    parser.add_argument("--databases", nargs="+", default=[""], help="parts of the names of those to measure")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the contenders; raw always runs")
    parser.add_argument("--peers", action="store_true", help="Celery's backend and DBOS too")
    parser.add_argument("--luigi", metavar="PYTHON", help="Luigi too, by this interpreter")
    parser.add_argument("--slow-disk", type=int, metavar="MICROSECONDS", help="measure with slower syncs first")
    parser.add_argument("--growth-rows", type=int, default=10_000_000)
    parser.add_argument("--directory", type=Path, help="where files are made; on the disk to be measured")
    parser.add_argument("--is-slow", action="store_true", help=argparse.SUPPRESS)  # it runs under the shim already
    options = parser.parse_args()
    options.directory = (options.directory or Path(tempfile.gettempdir())).absolute()
    return options


def microseconds_of_a_sync(folder: Path) -> float:
    """Return the median time in which 8 kB get onto the disk."""
    taken = []
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(200):
            file.seek(0)
            file.write(bytes(8192))
            begun = time.perf_counter()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(taken)


def print_machine(folder: Path) -> None:
    """Tell what the figures are of."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = models[0].partition(": ")[2] if models else model
    found = [f"Python {platform.python_version()}", f"SQLite {sqlite3.sqlite_version}"]
    for library in LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    print(f"{os.cpu_count()} processors ({model}), {platform.system()} {platform.release()}; {', '.join(found)}")
    print(f"to sync 8 kB in {folder} takes {microseconds_of_a_sync(folder):,.0f} us")


def peers(database: Database, shape: str, options: argparse.Namespace) -> list[Callable[[], Contender]]:
    """Return what makes the peers that can take part."""
    if database.name not in PEERS_IN:
        return []
    found: list[Callable[[], Contender]] = []
    for wal in (False, True) if database.kind == "sqlite" else (False,):
        if options.peers and shape in ("one", "threads", "processes"):
            found.append(partial(Celery, database, wal=wal))
        if options.peers and shape in ("one", "threads"):
            found.append(partial(Dbos, database, wal=wal))
        if options.luigi and shape == "one":
            found.append(partial(Luigi, database, options.luigi, wal=wal))
    return found


def interleaved(cases: dict[str, Callable[[], Sample]], repeats: int) -> tuple[dict[str, list[Sample]], bool]:
    """Take a sample of each in each repeat; return them, and whether all went well. Who fails takes no more part."""
    chance = random.Random(1)
    taken: dict[str, list[Sample]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name in chance.sample(list(taken), len(taken)):
            try:
                taken[name].append(cases[name]())
            except Exception as error:  # noqa: BLE001  (the others go on)
                print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
                del taken[name]
    return taken, len(taken) == len(cases)


def measure(database: Database, shape: str, options: argparse.Namespace) -> tuple[dict[str, list[Sample]], bool]:
    """Measure one shape on one database, print it, and return it, and whether all went well."""
    ours: list[Callable[[], Contender]] = [partial(kind, database) for kind in of_shape(shape)]

    def sample(make: Callable[[], Contender]) -> Sample:
        return make().sample(shape, options.seconds)

    cases: dict[str, Callable[[], Sample]] = {}
    for make in [*ours, *peers(database, shape, options)]:
        name = make().name
        if name.startswith(RAW) or any(part in name for part in options.only):
            cases[name] = partial(sample, make)
    taken, all_well = interleaved(cases, options.repeats)
    print_table(f"{database.name}, {TITLES[shape]}", taken, lambda _name: next(iter(cases)))
    return taken, all_well


def measure_growth(database: Database, options: argparse.Namespace) -> tuple[dict[str, list[Sample]], bool]:
    """Do so in a large table, whose ratios are those to an empty one."""
    rows = options.growth_rows
    suffix = growth.suffix_of(rows)
    kinds = [Raw, Taskruns, *([TaskrunsGrouped] if has_group_commit(TaskRunHistory) else [])]
    with growth.filled(database, rows, options.directory) as large:
        taken, all_well = interleaved(growth.cases(kinds, database, large, rows, options.seconds), options.repeats)
    print_table(f"{database.name}, one thread, growth", taken, lambda name: name.removesuffix(suffix))
    return taken, all_well


def measure_all(options: argparse.Namespace) -> tuple[Taken, bool]:
    """Measure what the options ask for."""
    all_taken: Taken = {}
    all_well = True
    with ExitStack() as at_end:
        folder = Path(at_end.enter_context(tempfile.TemporaryDirectory(dir=options.directory)))
        databases = sqlite_databases(folder)
        for name, url in (("PostgreSQL", options.postgresql), ("MariaDB", options.mariadb)):
            if url:
                databases.append(server_database(name, url))
                at_end.callback(databases[-1].drop)
        for database in databases:
            if not any(part in database.name for part in options.databases):
                continue
            for shape in options.shapes:
                if shape == "growth" and (database.name not in PEERS_IN or options.is_slow):
                    continue
                taken, is_well = (
                    measure_growth(database, options) if shape == "growth" else measure(database, shape, options)
                )
                all_taken |= {(database.name, shape, name): samples for name, samples in taken.items()}
                all_well = all_well and is_well
    return all_taken, all_well


def measure_slowly(options: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """Run this program with a slow disk, and return whether all went well."""
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        environment = slow_disk.environment(options.slow_disk, Path(name))
        if environment is None:
            print("no slow disk: there is no C compiler, cc")
            return False
        with ExitStack() as at_end:
            command = [sys.executable, __file__, *arguments, "--is-slow"]
            if options.postgresql:
                url = at_end.enter_context(slow_disk.postgresql(environment, options.directory))
                if url is None:
                    print("no slow disk for PostgreSQL: there is no pg_ctl")
                # of an option that is given twice the last one counts
                command += ["--postgresql", url or ""]
            command += ["--mariadb", ""]
            print(f"\nA slow disk: each sync takes {options.slow_disk:,} us longer", flush=True)
            return subprocess.run(command, check=False, env=os.environ | environment).returncode == 0


def main() -> None:
    """Measure with a slow disk if that is asked for, then without, and print what is reached."""
    options = parsed()
    print_machine(options.directory)
    if not has_group_commit(TaskRunHistory):
        print("this version of taskruns has no group commit: skipped")
    all_well = True
    if options.slow_disk and not options.is_slow:
        all_well = measure_slowly(options, sys.argv[1:])
        print("\nThe disk as it is", flush=True)
    taken, is_well = measure_all(options)
    print_summary(taken)
    if not options.is_slow:
        print_targets(taken, growth.suffix_of(options.growth_rows))
    sys.exit(not (all_well and is_well))


if __name__ == "__main__":
    main()
