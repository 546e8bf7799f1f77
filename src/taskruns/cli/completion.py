"""``taskruns completion``."""

import click
from click.shell_completion import get_completion_class

from taskruns.cli import cli


@click.command("completion", short_help="Print what completes commands, options and tasks.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print what makes SHELL complete commands, options and task ids.

    For bash: `eval "$(taskruns completion bash)"` in ~/.bashrc.
    """
    completion = get_completion_class(shell)
    if completion is None:
        raise click.ClickException(f"no completion for {shell}")
    click.echo(completion(cli, {}, "taskruns", "_TASKRUNS_COMPLETE").source())
    if shell == "bash":
        click.echo("COMP_WORDBREAKS=${COMP_WORDBREAKS//:/}")  # or it splits task ids and URLs there
