"""The limits on the code's structure, checked on every file; and that each check can fail."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structure_rules as rules

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
TIERS = ("unit", "component", "cluster", "e2e")
Rule = Callable[[str], Iterator[str]]

CLEAN = '"""What it is for."""\n\ntry:\n    pass\nexcept ValueError:\n    pass\n'
LONG_FUNCTION = "def f():\n" + "    pass\n" * rules.FUNCTION_LINES
BIG_CLASS = "class C:\n" + "".join(f"    def m{n}(self): ...\n" for n in range(rules.CLASS_METHODS + 1))


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def offences(rule: Rule, paths: list[Path]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{text}" for path in paths for text in rule(path.read_text())]


@pytest.mark.parametrize("rule", [rules.sizes, rules.words, rules.handlers])
def test_all_code_keeps_the_rule(rule: Rule) -> None:
    everything = files("src", "tests", "tools", "bench")
    assert len(everything) > 20
    rules.nothing_of(offences(rule, everything))


def test_no_program_is_started_through_a_shell() -> None:
    rules.nothing_of(offences(rules.shells, files("src", "tools", "bench")))


def test_the_model_is_pure() -> None:
    model = files("src/hostler/model")
    assert len(model) > 10
    rules.nothing_of(offences(rules.impurities, model))


def marks(source: str) -> set[str]:
    """Names of pytest's marks in the module's `pytestmark`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "pytestmark" for target in node.targets):
            return {found.attr for found in ast.walk(node.value) if isinstance(found, ast.Attribute)}
    return set()


def test_each_test_file_carries_the_mark_of_its_tier() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for tier in TIERS
        for path in files(f"tests/{tier}")
        if path.name.startswith("test_") and marks(path.read_text()) & set(TIERS) != {tier}
    ]
    rules.nothing_of(wrong)


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (rules.sizes, LONG_FUNCTION),
        (rules.sizes, "async " + LONG_FUNCTION),
        (rules.sizes, BIG_CLASS),
        (rules.sizes, "x = 1\n" * (rules.FILE_LINES + 1)),
        (rules.words, "x = 1\n"),
        (rules.words, CLEAN + "# TO" + "DO: later\n"),
        (rules.words, CLEAN + "x = 1  # no" + "qa\n"),
        (rules.words, CLEAN + "x = 1  # type: " + "ignore\n"),
        (rules.handlers, "try:\n    pass\nexcept:\n    pass\n"),
        (rules.handlers, "try:\n    pass\nexcept Exception:\n    pass\n"),
        (rules.handlers, "try:\n    pass\nexcept (OSError, BaseException) as e:\n    pass\n"),
        (rules.impurities, "import os\n"),
        (rules.impurities, "from pathlib import Path\n"),
        (rules.impurities, "open('x')\n"),
        (rules.shells, "import os\nos.system('ls')\n"),
        (rules.shells, "subprocess.run('ls', shell=True)\n"),
    ],
)
def test_the_rule_finds_an_offence(rule: Rule, source: str) -> None:
    assert list(rule(source))


@pytest.mark.parametrize("rule", [rules.sizes, rules.words, rules.handlers, rules.impurities, rules.shells])
def test_the_rule_lets_clean_code_pass(rule: Rule) -> None:
    assert list(rule(CLEAN)) == []


def test_a_broad_handler_with_its_reason_or_that_raises_again_passes() -> None:
    again = "try:\n    pass\nexcept BaseException:\n    undo()\n    raise\n"
    assert list(rules.handlers(again)) == []
    same = "try:\n    pass\nexcept Exception:  # top of the task: it must not take the others with it\n    pass\n"
    before = "try:\n    pass\n# top of the task\nexcept Exception:\n    pass\n"
    assert list(rules.handlers(same)) == list(rules.handlers(before)) == []


def test_programs_are_found_in_every_way_of_writing_them() -> None:
    source = """
IMG = "qemu-img"
async def f():
    command = ["swtpm", "socket"]
    await asyncio.create_subprocess_exec(IMG, "info")
    subprocess.run(command)
    subprocess.Popen(["gcc", "x"])
    shutil.which("virsh")
    helper.run("write", "-P")
    subprocess.run("not a literal".upper())
"""
    assert {word for _, word in rules.programs(source)} == {"qemu-img", "swtpm", "gcc", "virsh"}
    assert list(rules.mentions("helper('mkfs.ext4', '-F')\n'mkfs.ext4 x'\n", {"mkfs.ext4"})) == [(1, "mkfs.ext4")]
