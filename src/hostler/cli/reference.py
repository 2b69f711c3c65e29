"""The reference pages, made from the commands themselves so that they cannot go stale.

python -m hostler.cli.reference commands > docs/cli.md
python -m hostler.cli.reference errors > docs/errors-and-exit-codes.md
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import click

from hostler.cli.exit_codes import BY_ERROR, EXPLAINED, MEANING, exit_code
from hostler.cli.lazy import GlobalOption, global_options
from hostler.cli.main import root
from hostler.model.errors import ErrorCode

HEAD = """# The command line

`hostler` talks to the daemon of a host over its API. This page is made by `python -m hostler.cli.reference commands`
from the commands themselves.

"""

ERRORS_HEAD = """# Errors and exit codes

Every error says what it is about, why, and what to do next:

    error: vm web1: it is running
      shut it down first: hostler vm shutdown web1

With `--json` it is one JSON object on standard error, `{"code", "object", "cause", "advice", "details"}`, as the API
answers it. The codes and the exit codes are part of the interface: more may come, none changes its meaning. This page
is made by `python -m hostler.cli.reference errors`.

"""

OUTPUT = """## Output

Results go to standard output, messages about errors, questions and progress to standard error. On a terminal lists are
tables in colour; in a pipe they are plain text aligned by blanks. `--json` prints exactly the API's JSON, one document
and nothing else; a command that waits for a job prints the job as it ended.

## Waiting

Commands that start a job wait for it, unless `--no-wait` is given. Ctrl-C ends the waiting, not the job, and says how
to watch or cancel it. While `hostler vm move` waits, a second Ctrl-C within three seconds cancels the move.

## Which host

`--host` or `$HOSTLER_HOST` names a unix socket (`/run/hostler/api.sock`), an address (`https://host:port`) or an entry
of `~/.config/hostler/hosts.json` (mode 0600):

    {"hosts": {"web": {"url": "https://10.0.0.1:8690", "fingerprint": "<SHA-256>", "token_file": "/root/web.token"}}}

`fingerprint` accepts exactly that certificate; `ca_file` names an authority instead. A token is read from
`$HOSTLER_TOKEN`, from the file named by `$HOSTLER_TOKEN_FILE`, or from the entry's `token_file` (mode 0600); never from
the command line, which every user of the machine can read.

"""


def commands_page() -> str:
    """docs/cli.md."""
    parts = [HEAD, OUTPUT, "## Options every command takes\n\n", _options(global_options(), _context(root, None))]
    for command, context in _leaves(root, _context(root, None)):
        parts.append(_section(command, context))
    return "".join(parts).rstrip() + "\n"


def errors_page() -> str:
    """docs/errors-and-exit-codes.md."""
    lines = [ERRORS_HEAD, "## Exit codes\n\n| exit code | meaning | error codes |\n|---|---|---|\n"]
    for code, meaning in MEANING.items():
        errors = ", ".join(f"`{error}`" for error in BY_ERROR if BY_ERROR[error] is code)
        lines.append(f"| {int(code)} | {meaning} | {errors} |\n")
    lines.append("\n## Error codes\n\n| code | meaning | exit code |\n|---|---|---|\n")
    lines += [f"| `{code}` | {EXPLAINED[code]} | {int(exit_code(code))} |\n" for code in ErrorCode]
    return "".join(lines)


def _context(command: click.Command, parent: click.Context | None) -> click.Context:
    return click.Context(command, info_name=command.name, parent=parent)


def _leaves(group: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    assert isinstance(group, click.Group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = _context(command, context)
        if isinstance(command, click.Group):
            yield from _leaves(command, inner)
        else:
            yield command, inner


def _section(command: click.Command, context: click.Context) -> str:
    usage = " ".join(piece for piece in command.collect_usage_pieces(context) if piece)
    own = [parameter for parameter in command.params if not isinstance(parameter, GlobalOption)]
    return (
        f"## {context.command_path}\n\n    {context.command_path} {usage}\n\n{_text(command)}{_options(own, context)}"
    )


def _text(command: click.Command) -> str:
    """The help; what follows \\b is an example and stays as it is."""
    blocks = []
    for block in inspect.cleandoc(command.help or "").split("\n\n"):
        if block.startswith("\b\n"):
            blocks.append("\n".join(f"    {line}" for line in block.removeprefix("\b\n").splitlines()))
        else:
            blocks.append(" ".join(block.split()))
    return "\n\n".join(blocks) + "\n\n"


def _options(parameters: list[click.Parameter], context: click.Context) -> str:
    records = [
        record
        for parameter in parameters
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)) is not None
    ]
    if not records:
        return ""
    rows = "".join(f"| `{_cell(names)}` | {_cell(text)} |\n" for names, text in records)
    return f"| option | |\n|---|---|\n{rows}\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Prints the page that the first argument names."""
    pages = {"commands": commands_page, "errors": errors_page}
    name = sys.argv[1] if len(sys.argv) > 1 else "commands"
    if name not in pages:
        click.echo(f"usage: python -m hostler.cli.reference [{'|'.join(pages)}]", err=True)
        return 2
    click.echo(pages[name](), nl=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
