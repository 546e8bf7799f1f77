"""What a check has found, and how it is shown."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import click
from rich.console import Console
from rich.text import Text

from taskruns.cli.output import printable

Status = Literal["ok", "note", "problem"]
_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; the advice says what to do about it."""

    check: str
    status: Status
    message: str
    advice: str | None = None

    def print(self) -> None:
        """Print it as a line for people."""
        words = self.message if self.advice is None else f"{self.message}; {self.advice}"
        status = (f"{self.status:<8} ", _STYLES[self.status])
        line = Text.assemble(status, (f"{self.check:<13} ", "bold"), printable(words))
        Console(highlight=False, soft_wrap=True).print(line)

    def print_json(self) -> None:
        """Print it as a line of JSON."""
        ascii_only = not (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
        click.echo(json.dumps(asdict(self), ensure_ascii=ascii_only))


Findings = Iterator[Finding]
