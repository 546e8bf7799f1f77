"""A process that upgrades one database: ``python migrator.py URL``, when a line comes in."""

import sys

from taskruns import TaskRunHistory

if __name__ == "__main__":
    with TaskRunHistory.connect(sys.argv[1]) as history:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        history.upgrade()
        history.check_version()
