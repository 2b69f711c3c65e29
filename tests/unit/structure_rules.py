"""The rules of the code's structure as pure functions: source text in, offences out. `test_structure` applies them."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator

import pytest

FUNCTION_LINES = 60
FILE_LINES = 600
CLASS_METHODS = 25

Function = ast.FunctionDef | ast.AsyncFunctionDef

UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
BLANKET = re.compile(r"#\s*(noqa(?!:)|type:\s*ignore(?!\[)|ruff:\s*noqa(?!:)|mypy:\s*ignore)")
"""Ignores that name no rule switch off more than their writer meant."""

PURE_MODULES = frozenset(
    [
        "__future__",
        "abc",
        "collections",
        "collections.abc",
        "dataclasses",
        "datetime",
        "difflib",
        "enum",
        "functools",
        "hashlib",
        "ipaddress",
        "itertools",
        "json",
        "math",
        "operator",
        "pydantic",
        "re",
        "string",
        "typing",
        "typing_extensions",
        "unicodedata",
        "uuid",
    ]
)
"""What the model may import beside itself: nothing of it reaches a file, a process, a socket or the network."""


def nothing_of(found: list[str]) -> None:
    """Fails with every offence in full: pytest shortens lists."""
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def sizes(source: str) -> Iterator[str]:
    """Files, functions and classes above the limits."""
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield f"1: file of {lines} lines, the limit is {FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{node.lineno}: {node.name}() has {length} lines, the limit is {FUNCTION_LINES}"
        elif isinstance(node, ast.ClassDef):
            methods = sum(isinstance(child, Function) for child in node.body)
            if methods > CLASS_METHODS:
                yield f"{node.lineno}: class {node.name} has {methods} methods, the limit is {CLASS_METHODS}"


def words(source: str) -> Iterator[str]:
    """No docstring, unfinished work, blanket ignores."""
    if not ast.get_docstring(ast.parse(source)):
        yield "1: the module has no docstring"
    for number, line in enumerate(source.splitlines(), 1):
        if UNFINISHED.search(line):
            yield f"{number}: unfinished work belongs into the issue list"
        if BLANKET.search(line):
            yield f"{number}: an ignore names the rule it ignores"


def handlers(source: str) -> Iterator[str]:
    """Bare `except`; broad ones that neither raise again nor have the reason beside them (same or previous line)."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            yield f"{node.lineno}: bare except"
            continue
        if isinstance(node.body[-1], ast.Raise):
            continue
        broad = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} & {"Exception", "BaseException"}
        if broad and not any("#" in line for line in lines[max(0, node.lineno - 2) : node.lineno]):
            yield f"{node.lineno}: except {broad.pop()} without the reason beside it"


def impurities(source: str) -> Iterator[str]:
    """What a module of the model must not do."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("open", "print", "input")
        ):
            yield f"{node.lineno}: calls {node.func.id}()"
        for name in names:
            if name not in PURE_MODULES and not name.startswith("hostler.model"):
                yield f"{getattr(node, 'lineno', 0)}: imports {name}"


LAUNCHERS = {
    "subprocess": {"Popen", "run", "check_output", "check_call", "call"},
    "asyncio": {"create_subprocess_exec"},
    "shutil": {"which"},
    "os": {"execv", "execve", "execvp", "execvpe", "posix_spawn"},
}
"""Functions of the standard library that start a program or look for one."""


def _launches(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name):
        return call.func.id in {"Popen", "create_subprocess_exec", "which"}
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        return call.func.attr in LAUNCHERS.get(call.func.value.id, ())
    return False


def _first_word(node: ast.expr, known: dict[str, str]) -> str | None:
    """The program a first argument names: a literal, the head of a literal list, or a name bound to one of those."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.List | ast.Tuple) and node.elts:
        return _first_word(node.elts[0], known)
    if isinstance(node, ast.Starred):
        return _first_word(node.value, known)
    if isinstance(node, ast.Name):
        return known.get(node.id)
    return None


def _bound(tree: ast.Module) -> dict[str, str]:
    """Names of the module that are bound to a literal program or command."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        word = _first_word(value, {})
        if word is not None:
            known |= {target.id: word for target in targets if isinstance(target, ast.Name)}
    return known


def programs(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every program that the code starts or looks for, as far as the name stands in the module."""
    tree = ast.parse(source)
    known = _bound(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        word = _first_word(node.args[0], known) if _launches(node) else None
        if word is not None:
            yield node.lineno, word


def mentions(source: str, names: Collection[str]) -> Iterator[tuple[int, str]]:
    """Line and name of each string of the code that is exactly one of `names`: programs started through helpers."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
            yield node.lineno, node.value


def shells(source: str) -> Iterator[str]:
    """Programs started through a shell: their arguments would be read a second time."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        shell = [k for k in node.keywords if k.arg == "shell" and getattr(k.value, "value", True) is not False]
        if name in ("create_subprocess_shell", "system", "popen", "getoutput") or shell:
            yield f"{node.lineno}: starts a shell"
