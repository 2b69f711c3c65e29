"""The project's own tools: what the check runner makes of a test run, and what the lock keeps."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hostler_tool_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check = load("check")
lock = load("lock")


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("===== 3 passed in 0.1s =====", {"passed": 3}),
        (
            "=== 1 failed, 2 passed, 4 skipped, 7 deselected in 99.00s (0:01:39) ===",
            {"failed": 1, "passed": 2, "skipped": 4},
        ),
        (
            "= \x1b[31m1 failed\x1b[0m, \x1b[32m2 passed\x1b[0m, 2 errors in 1s =",
            {"failed": 1, "passed": 2, "error": 2},
        ),
        ("=== no tests ran in 0.01s ===", {}),
        ("3 passed the salt", {}),
    ],
)
def test_the_figures_of_the_closing_line(line: str, counts: dict[str, int]) -> None:
    assert (
        check.counts_of(f"tests/x.py ...\n=== 9 passed is only quoted ===\nmore\n{line}\n" if counts else line)
        == counts
    )


def result(name: str, ok: bool, **counts: int) -> object:
    return check.Result(name, ok, 1.0, "", counts)


def test_one_failed_stage_fails_the_run_and_the_last_line_counts(capsys: pytest.CaptureFixture[str]) -> None:
    results = [result("ruff", True), result("unit", True, passed=3, skipped=1), result("e2e", False, passed=1, error=2)]
    assert check.summary(results) == 1
    out = capsys.readouterr().out
    assert "failed: e2e" in out
    assert out.splitlines()[-1] == "4 passed, 2 failed, 1 skipped"


def test_a_run_without_failures_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.summary([result("unit", True, passed=3)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 passed, 0 failed, 0 skipped"


def test_a_runner_that_dies_without_a_closing_line_fails(tmp_path: Path) -> None:
    code, output = check.execute([sys.executable, "-c", "print('last words'); raise SystemExit(4)"], {})
    assert (code, output) == (4, "last words\n")


def test_tests_never_see_the_users_own_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOSTLER_HOST", "https://production:8690")
    monkeypatch.setenv("HOSTLER_TOKEN", "secret")
    monkeypatch.setenv("PATH", "/bin")
    seen = check.environment(tmp_path)
    assert not [name for name in seen if name.startswith("HOSTLER_")]
    assert seen["PATH"] == "/bin"


def test_the_lock_ignores_this_machines_package_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://elsewhere/simple")
    monkeypatch.setenv("UV_INDEX", "https://elsewhere/simple")
    assert not [name for name in lock.clean_environment() if name.startswith(("PIP_", "UV_"))]


def test_the_lock_keeps_what_linux_needs() -> None:
    text = "a==1 \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\n"
    text += "b==2 ; sys_platform == 'win32' \\\n    --hash=sha256:22\n"
    text += "c==3 ; python_full_version < '3.12' \\\n    --hash=sha256:33\nd==4 ; sys_platform == 'emscripten'\n"
    assert [block[0] for block in lock.blocks(text) if lock.for_linux(block)] == ["a", "c"]
    assert next(lock.blocks(text)).count("--hash") == 2
