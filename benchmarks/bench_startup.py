"""What `taskruns exec` adds to a short command, and the memory of one that waits: python benchmarks/bench_startup.py.

    python benchmarks/bench_startup.py [--rounds 20] [--postgresql URL] [--mariadb URL]

A round starts every command once, a new process each, in random order, and waits for its end. The ratios are to the
import of SQLAlchemy in the same round, which every program that uses it pays for. Bytecode is kept in a folder of the
benchmark's own, filled by a round that does not count, as a package has it that pip has installed. The tables of a
server's database have to be there; runs of the task ``bench-startup`` are left in it.

Times are the wall clock's, and the processor's in the process and its children: the latter says more on a machine that
is busy. The memory, on Linux, is that of a wrapper whose command sleeps: RSS, PSS (what it shares with others is split
between them) and what is its own alone.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from taskruns import TaskRunHistory

TASK = "bench-startup"
ONE = "import sqlalchemy"
SETTLED = 3.0
"""Seconds after which a wrapper has nothing to do but to wait."""


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return the seconds of a command, by the wall clock and of the processor's."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, used.ru_utime + used.ru_stime


def memory(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Return the memory of a process that waits, in MiB."""
    with subprocess.Popen(command, env=environment) as process:
        time.sleep(SETTLED)
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        process.terminate()
    sizes = {name: int(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return {"RSS": sizes["Rss"], "PSS": sizes["Pss"], "own": sizes["Private_Dirty"] + sizes["Private_Clean"]}


def spread(values: list[float], form: Callable[[float], str]) -> str:
    """Return the least, the middle and the most."""
    return " / ".join(form(value) for value in (min(values), statistics.median(values), max(values)))


def taskruns(*arguments: str) -> list[str]:
    """Return the command that the console script is."""
    return [sys.executable, "-c", "from taskruns.cli import main; main()", *arguments]


def compare_times(commands: dict[str, list[str]], environment: dict[str, str], rounds: int) -> None:
    walls: dict[str, list[float]] = {case: [] for case in commands}
    processors: dict[str, list[float]] = {case: [] for case in commands}
    for number in range(rounds + 1):
        for case in random.sample(list(commands), len(commands)):
            wall, processor = timed(commands[case], environment)
            if number:
                walls[case].append(wall)
                processors[case].append(processor)
    for what, times in (("wall clock", walls), ("processor", processors)):
        print(f"\n{what}, min / median / max of {rounds} rounds")
        for case, seconds in times.items():
            ratios = [one / other for one, other in zip(seconds, times[ONE], strict=True)]
            told = spread(seconds, lambda value: f"{1000 * value:.0f}")
            print(f"{case:30} {told:>18} ms   {spread(ratios, lambda ratio: f'{ratio:.2f}')} x")


def compare_memory(commands: dict[str, list[str]], environment: dict[str, str]) -> None:
    print("\nmemory while it waits, MiB")
    for case, command in commands.items():
        sizes = memory(command, environment)
        print(f"{case:30} {', '.join(f'{what} {size:.1f}' for what, size in sizes.items())}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--postgresql", metavar="URL")
    parser.add_argument("--mariadb", metavar="URL")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        urls = {"SQLite": f"sqlite:///{folder}/runs.db", "PostgreSQL": options.postgresql, "MariaDB": options.mariadb}
        urls = {kind: url for kind, url in urls.items() if url is not None}
        with TaskRunHistory.connect(urls["SQLite"]) as history:
            history.upgrade()
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            ONE: [sys.executable, "-c", ONE],
            "taskruns --version": taskruns("--version"),
        }
        for kind, url in urls.items():
            commands[f"taskruns exec, {kind}"] = taskruns("--db", url, "exec", TASK, "--", "true")

        compare_times(commands, environment, options.rounds)
        if Path("/proc/self/smaps_rollup").exists():
            sleep = "; import time; time.sleep(60)"
            commands = {"python": [sys.executable, "-c", f"pass{sleep}"], ONE: [sys.executable, "-c", f"{ONE}{sleep}"]}
            for kind, url in urls.items():
                commands[f"taskruns exec, {kind}"] = taskruns("--db", url, "exec", TASK, "--", "sleep", "60")
            compare_memory(commands, environment)


if __name__ == "__main__":
    main()
