"""``python -m taskruns`` is ``taskruns``."""

from taskruns.cli import main

main()
