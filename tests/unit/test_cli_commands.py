"""The commands as a whole: what they import, what they suggest, how they fail, and that the reference is fresh."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from hostler.cli import reference
from hostler.cli.exit_codes import BY_ERROR, EXPLAINED, MEANING, Exit, exit_code
from hostler.cli.lazy import GlobalOption, LazyGroup
from hostler.cli.main import HELPS, main, root
from hostler.model.errors import ErrorCode

pytestmark = pytest.mark.unit

DOCS = Path(__file__).parents[2] / "docs"
SLOW = ("pydantic", "httpx2", "rich", "websockets", "asyncio", "ssl")
"""What would make `hostler --help` slow."""


def leaves(group: LazyGroup, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, LazyGroup):
            yield from leaves(command, click.Context(command, info_name=name, parent=context))
        else:
            yield f"{context.command_path} {name}", command


def every_command() -> list[tuple[str, click.Command]]:
    assert isinstance(root, LazyGroup)
    return list(leaves(root, click.Context(root, info_name="hostler")))


def imported_by(*words: str) -> set[str]:
    """Modules in memory after running the command line in a fresh Python."""
    program = (
        "import sys\nfrom hostler.cli.main import main\ncode = main(sys.argv[1:])\n"
        "print('\\n' + '\\0'.join(sys.modules), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rsplit("\n", 2)[1].split("\0"))


@pytest.mark.parametrize("words", [["--help"], ["vm", "--help"], ["vm", "create", "--help"], ["completion", "zsh"]])
def test_help_imports_nothing_slow(words: list[str]) -> None:
    assert not imported_by(*words) & set(SLOW)


def test_help_of_the_root_imports_no_command() -> None:
    loaded = imported_by("--help")
    assert "hostler.cli.main" in loaded
    assert not [name for name in loaded if name.startswith("hostler.cli.commands.")]


def test_every_command_has_help_and_the_global_options() -> None:
    commands = every_command()
    assert len(commands) > 40
    for path, command in commands:
        assert command.help, path
        names = {o for p in command.params if isinstance(p, GlobalOption) for o in p.opts}
        assert names == {"--host", "--json", "--quiet", "-q"}, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{path} {parameter.name}"


def test_one_line_helps_of_the_root_are_those_of_the_groups() -> None:
    context = click.Context(root, info_name="hostler")
    assert isinstance(root, LazyGroup)
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        assert command is not None
        assert (command.help or "").startswith(HELPS[name].rstrip(".")), name


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["vm", "strat"], "hostler vm start"),
        (["volum", "list"], "hostler volume"),
        (["shutdown", "web1"], "hostler vm shutdown"),
        (["vm", "move", "a", "b", "--bandwith", "1"], "--bandwidth"),
    ],
)
def test_the_near_command_is_suggested(words: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == Exit.USAGE
    assert suggestion in capsys.readouterr().err


def test_nothing_near_suggests_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qqqqqq"]) == Exit.USAGE
    captured = capsys.readouterr()
    assert "There is no command 'qqqqqq'" in captured.err
    assert "Did you mean" not in captured.err


def test_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    socket = tmp_path / "none.sock"
    assert main(["--host", str(socket), "vm", "list"]) == Exit.UNREACHABLE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"error: host {socket}: no connection: there is no such socket\n  is hostlerd running? start it with ./run up\n"
    )


@pytest.mark.parametrize("words", [["--json", "vm", "list"], ["vm", "--json", "list"], ["vm", "list", "--json"]])
def test_json_stands_anywhere_and_makes_errors_json(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--host", str(tmp_path / "none.sock")]) == Exit.UNREACHABLE
    captured = capsys.readouterr()
    problem = json.loads(captured.err)
    assert captured.out == ""
    assert (problem["code"], problem["details"]) == ("peer-unreachable", {"sent": False})


def test_a_misused_command_is_a_problem_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", "show", "--json"]) == Exit.USAGE
    assert json.loads(capsys.readouterr().err)["code"] == "invalid-input"


def test_an_empty_name_is_not_the_whole_collection(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("", ".", "..", "a/b"):
        assert main(["vm", "delete", name, "--yes"]) == Exit.USAGE
        assert "is not the name or id of a vm" in capsys.readouterr().err


def test_every_error_has_an_exit_code_and_words() -> None:
    assert set(BY_ERROR) == set(ErrorCode) == set(EXPLAINED)
    assert set(MEANING) == set(Exit)
    for code in ErrorCode:
        assert exit_code(code) not in (Exit.OK, Exit.INTERRUPTED, Exit.PIPE)


def test_exit_codes_never_change() -> None:
    """Scripts rely on the numbers."""
    assert {code.name: code.value for code in Exit} == {
        "OK": 0, "FAILURE": 1, "USAGE": 2, "NOT_FOUND": 3, "REFUSED": 4, "NOT_PERMITTED": 5, "UNREACHABLE": 6,
        "UNKNOWN": 7, "CANCELLED": 8, "INTERRUPTED": 130, "PIPE": 141,
    }  # fmt: skip


def test_the_reference_is_fresh() -> None:
    advice = "run: python -m hostler.cli.reference"
    assert (DOCS / "cli.md").read_text() == reference.commands_page(), f"{advice} commands > docs/cli.md"
    errors = (DOCS / "errors-and-exit-codes.md").read_text()
    assert errors == reference.errors_page(), f"{advice} errors > docs/errors-and-exit-codes.md"
