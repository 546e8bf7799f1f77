"""Lines of input, and what becomes of those that cannot be used."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Self

import click

from taskruns.cli import complain
from taskruns.cli.output import printable

MAX_LINE = 16 * 1024 * 1024
"""Bytes of the longest line that is read as one; a run with the longest error takes 400 kB."""

_MAX_REASON = 300


class Rejects:
    """The lines that cannot be used: each is told to the user, and kept in the file at ``path``, if there is one.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.count = 0
        self._path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        if self._path is not None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._file = os.fdopen(os.open(self._path, flags, stat.S_IRUSR | stat.S_IWUSR), "wb")
            if self._is_regular() and not _ends_a_line(self._path):
                self._file.write(b"\n")  # whoever wrote there before was killed on the way
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with self._file:
                self.sync()

    def reject(self, number: int, line: bytes, reason: str, rest: Iterable[bytes] = ()) -> None:
        """Complain about a line and keep it, with the ``rest`` of it if it is longer, as it is."""
        self.count += 1
        if len(reason) > _MAX_REASON:  # it may quote the line
            reason = reason[:_MAX_REASON] + "..."
        complain(f"line {number}: {printable(reason)}")
        if self._file is not None:
            self._file.write(line)
        for piece in rest:  # to its end, kept or not
            line = piece
            if self._file is not None:
                self._file.write(line)
        if self._file is not None and not line.endswith(b"\n"):
            self._file.write(b"\n")

    def sync(self) -> None:
        """Have what was kept on disk."""
        if self._file is not None:
            self._file.flush()
            if self._is_regular():
                os.fsync(self._file.fileno())

    def _is_regular(self) -> bool:
        return self._file is not None and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def refuse_same_file(file: str, rejects: Path | None) -> None:
    """Refuse to read from the file that rejected lines are added to: there would be no end."""
    if rejects is not None and rejects.is_file() and Path(file).is_file() and rejects.samefile(file):
        raise click.BadParameter("it is the file that is read", param_hint="--rejects")
