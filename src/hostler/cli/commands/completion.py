"""`hostler completion`."""

from __future__ import annotations

import click

from hostler.cli.lazy import Command


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash: echo 'eval "$(hostler completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(hostler completion zsh)"' >> ~/.zshrc
    fish: hostler completion fish > ~/.config/fish/completions/hostler.fish
    """
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - only when a shell asks

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(context.find_root().command, {}, "hostler", "_HOSTLER_COMPLETE").source())
