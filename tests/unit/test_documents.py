"""What the documents tell people to type exists: every command, every option, every link, every table."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import structure_rules as rules

from hostler.cli.main import root
from hostler.daemon.config import parse_config
from hostler.model.limits import PROFILES, Profile
from hostler.model.units import GiB, TiB
from hostler.model.vm import CriticalReason, VmState

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
)
HAND_WRITTEN = [path for path in DOCUMENTS if path.name not in ("cli.md", "errors-and-exit-codes.md")]

SPOKEN = re.compile(r"`(?:\./run )?hostler ([a-z][^`]*)`")
TYPED = re.compile(r"^    (?:\./run )?hostler ([a-z].*)$", re.MULTILINE)


def said(path: Path) -> list[str]:
    """Command lines of `hostler` in a document, without the program's name."""
    text = path.read_text()
    spoken = [" ".join(words.split()) for words in SPOKEN.findall(text)]
    return spoken + [line.partition(" #")[0].strip() for line in TYPED.findall(text)]


def fault(words: list[str]) -> str | None:
    """What is wrong with a command line: a command or a long option that is not there."""
    command: click.Command = root
    context = click.Context(root)
    options = {name for parameter in root.params for name in parameter.opts}
    while isinstance(command, click.Group):
        if not words:
            return None
        try:
            found = command.get_command(context, words[0])
        except click.UsageError:  # our groups refuse what they have not, and suggest something
            found = None
        if found is None:
            return f"there is no command {words[0]!r}"
        command, words = found, words[1:]
        options |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    wrong = [word for word in words if word.startswith("--") and word.partition("=")[0] not in {*options, "--help"}]
    return f"there is no option {wrong[0]}" if wrong else None


def test_every_command_and_option_in_the_documents_exists() -> None:
    lines = [(path.name, line) for path in HAND_WRITTEN for line in said(path)]
    assert len(lines) > 40
    rules.nothing_of(
        [f"{name}: hostler {line}: {wrong}" for name, line in lines if (wrong := fault(shlex.split(line)))]
    )


@pytest.mark.parametrize("line", ["vm strat web1", "vm move web1 b --dry", "nonsense", "disk add web1 --sise 3G"])
def test_a_command_that_is_not_there_is_found(line: str) -> None:
    assert fault(line.split())


def test_links_lead_somewhere() -> None:
    broken = []
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            name, _, anchor = target.partition("#")
            there = path.parent / name if name else path
            if "://" in target:
                continue
            if not there.exists() or (anchor and anchor not in anchors(there)):
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    rules.nothing_of(broken)


def anchors(path: Path) -> set[str]:
    """Names under which a page's headings can be linked."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_options_of_the_daemon_are_told_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--help"], {})
    real = set(re.findall(r"^\s+(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--version", "--help"}
    section = (ROOT / "docs/user-guide.md").read_text().partition("## The daemon")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(--[a-z-]+)", section)) == real


def test_every_state_and_reason_is_explained() -> None:
    guide = (ROOT / "docs/user-guide.md").read_text()
    assert [state for state in VmState if f"`{state}`" not in guide] == []
    assert [reason for reason in CriticalReason if f"| `{reason}` |" not in guide] == []


def test_the_table_of_limits_is_that_of_the_code() -> None:
    section = (ROOT / "docs/user-guide.md").read_text().partition("## Limits")[2].partition("\n## ")[0]
    rows = {
        cells[0]: cells[1:] for line in section.splitlines() if len(cells := re.split(r" *\| *", line.strip("| "))) > 2
    }
    ours, theirs = PROFILES[Profile.HOSTLER], PROFILES[Profile.HYPER_V_2008_R2]
    assert rows["virtual processors of a VM"] == [str(ours.vm_vcpus), str(theirs.vm_vcpus)]
    assert rows["memory of a VM"] == [f"{ours.vm_memory // TiB} TiB", f"{theirs.vm_memory // GiB} GiB"]
    assert rows["network adapters"] == [str(ours.vm_nics), str(theirs.vm_nics)]
    assert rows["running VMs of a host"] == ["", str(theirs.host_running_vms)]
    assert ours.host_running_vms is None
    assert rows["logical processors of a host"] == ["", str(theirs.host_logical_processors)]
    assert rows["size of a VHD"] == [f"{ours.vhd_size // GiB} GiB"] * 2
