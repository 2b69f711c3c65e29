"""Commands that are imported when used, take the global options wherever these stand, and suggest the near name.

`hostler --help` shows one line for each group without importing any of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from hostler.cli.settings import Settings
from hostler.model.names import nearest


def _set(name: str) -> Any:
    def callback(context: click.Context, _parameter: click.Parameter, value: Any) -> None:
        settings = context.ensure_object(Settings)
        if value:
            setattr(settings, name, value)

    return callback


class GlobalOption(click.Option):
    """An option that every command takes and that means the same everywhere."""


def global_options() -> list[click.Parameter]:
    """Fresh ones: click ties an option to its command."""
    return [
        GlobalOption(
            ["--host", "global_host"],
            metavar="HOST",
            callback=_set("host"),
            expose_value=False,
            help="Which host to talk to: a socket path, https://host:port, or a name from hosts.json "
            "(default: $HOSTLER_HOST, else this machine).",
        ),
        GlobalOption(
            ["--json", "global_json"],
            is_flag=True,
            callback=_set("json"),
            expose_value=False,
            help="Print the API's JSON, one document, and errors as JSON on stderr.",
        ),
        GlobalOption(
            ["--quiet", "-q", "global_quiet"],
            is_flag=True,
            callback=_set("quiet"),
            expose_value=False,
            help="Print only what was asked for: names in lists, no messages, no progress.",
        ),
    ]


class Command(click.Command):
    """A command with the global options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(global_options())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options first, the global ones after them."""
        own: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                (shared if isinstance(parameter, GlobalOption) else own).append(record)
        for title, records in (("Options", own), ("Global options", shared)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class ReaderGone(Exception):
    """Whoever read our output has gone (`hostler vm list | head -1`). click would make an ordinary failure of it."""


class LazyGroup(click.Group):
    """A group whose commands are named by "module:attribute" and imported one at a time."""

    def __init__(
        self, *args: Any, lazy: Mapping[str, str] | None = None, helps: Mapping[str, str] | None = None, **kwargs: Any
    ) -> None:
        """`helps`: one line for each command, for a group that must not import them to show its help."""
        super().__init__(*args, **kwargs)
        self._lazy, self._helps = dict(lazy or {}), dict(helps or {})
        self.params.extend(global_options())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table, which is the order people need them in."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = self._lazy.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        found = getattr(importlib.import_module(f"hostler.cli.commands.{module}"), attribute)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = [(name, self.help_line(ctx, name)) for name in self._lazy]
        with formatter.section("Commands"):
            formatter.write_dl(records)

    def help_line(self, ctx: click.Context, name: str) -> str:
        """What a command does, in one line."""
        if name in self._helps:
            return self._helps[name]
        command = self.get_command(ctx, name)
        assert command is not None
        return command.get_short_help_str(100)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderGone from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self._lazy and not args[0].startswith("-"):
            self._unknown(ctx, args[0])
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Names by prefix, without importing the commands."""
        from click.shell_completion import CompletionItem  # noqa: PLC0415 - only when a shell asks

        found = [CompletionItem(name, help=self._helps.get(name)) for name in self._lazy if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def _unknown(self, ctx: click.Context, name: str) -> NoReturn:
        near = nearest(name, self._lazy)
        text = f"There is no command {name!r}."
        if near is not None:
            text += f" Did you mean '{ctx.command_path} {near}'?"
        elif deeper := self._inside(ctx, name):
            text += f" Did you mean '{ctx.command_path} {deeper}'?"
        raise click.UsageError(text, ctx)

    def _inside(self, ctx: click.Context, name: str) -> str | None:
        """For people who leave out the group: `hostler start` is `hostler vm start`."""
        for group in self._lazy:
            command = self.get_command(ctx, group)
            if isinstance(command, LazyGroup) and (near := nearest(name, command.list_commands(ctx))):
                return f"{group} {near}"
        return None
