"""`hostler`: the root command, and the one place where an error becomes words and an exit code."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import click

from hostler.cli.exit_codes import Exit, exit_code
from hostler.cli.lazy import LazyGroup, ReaderGone
from hostler.cli.output import printable
from hostler.cli.settings import Settings
from hostler.model.errors import HostlerError, InternalError, InvalidInput

GROUPS = {
    "vm": "vm:group",
    "disk": "disk:group",
    "nic": "nic:group",
    "checkpoint": "checkpoint:group",
    "volume": "volume:group",
    "pool": "pool:group",
    "backup": "backup:group",
    "import": "imports:group",
    "export": "imports:export",
    "host": "host:group",
    "job": "job:group",
    "token": "token:group",
    "completion": "completion:command",
    "version": "version:command",
}
HELPS = {
    "vm": "Virtual machines: create, run, move between hosts.",
    "disk": "Disks of a VM: add, remove, move, flatten, grow, limit and change them while it runs.",
    "nic": "Network adapters of a VM.",
    "checkpoint": "Checkpoints of a VM: make, apply, delete while it runs.",
    "volume": "Volumes: disk images in all formats.",
    "pool": "Pools: directories and storage systems that volumes are in.",
    "backup": "Backups of VMs in a directory of the host.",
    "import": "Machines from Hyper-V, OVF, OVA, disk images, exported folders.",
    "export": "Write a VM that is off to a folder, an OVF or an OVA.",
    "host": "This host and the hosts it trusts.",
    "job": "Long work: look, wait, cancel.",
    "token": "Tokens for the API over https.",
    "completion": "Print the completion script of a shell.",
    "version": "Print the versions of this program and of the host.",
}


@click.command(
    "hostler",
    cls=LazyGroup,
    lazy=GROUPS,
    helps=HELPS,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)
@click.pass_context
def root(context: click.Context) -> None:
    """Run virtual machines on Linux hosts, and move them while they run.

    Sizes are written like 512M, 20G or 1.5T. Exit codes are listed in docs/errors-and-exit-codes.md.
    """
    settings = context.ensure_object(Settings)
    context.call_on_close(settings.close)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding must not end a command
            stream.reconfigure(errors="replace")
    try:
        result = root.main(args=words, prog_name="hostler", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else Exit.OK
    except HostlerError as error:
        return _failed(error, as_json)
    except click.ClickException as error:
        return _misused(error, as_json)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return Exit.INTERRUPTED
    except (ReaderGone, BrokenPipeError):
        # Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.PIPE
    except Exception as error:  # top of the program: people get a sentence, not a traceback
        if os.environ.get("HOSTLER_DEBUG"):
            raise
        text = f"{type(error).__name__}: {error}"
        return _failed(InternalError("hostler", text, "set HOSTLER_DEBUG=1 to see where, and report it"), as_json)


def _failed(error: HostlerError, as_json: bool) -> int:
    if as_json:
        from hostler.model.problem import Problem  # noqa: PLC0415 - pydantic only when it is needed

        click.echo(Problem.of(error).model_dump_json(), err=True)
    else:
        click.echo(printable(f"error: {error.object}: {error.cause}"), err=True)
        for line in printable(error.advice).splitlines():
            click.echo(f"  {line}", err=True)
    return exit_code(error.code)


def _misused(error: click.ClickException, as_json: bool) -> int:
    if as_json:
        return _failed(InvalidInput("command line", error.format_message().rstrip("."), "see: hostler --help"), True)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return Exit.USAGE
    click.echo(f"error: {error.format_message().rstrip('.')}", err=True)
    if isinstance(error, click.UsageError) and error.ctx is not None:
        click.echo(f"  see: {error.ctx.command_path} --help", err=True)
    return Exit.USAGE if isinstance(error, click.UsageError) else Exit.FAILURE
