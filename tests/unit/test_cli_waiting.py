"""Waiting for a job over what can happen meanwhile, with a host that does what the test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import pytest

from hostler.cli import waiting
from hostler.cli.exit_codes import Exit
from hostler.cli.settings import Settings
from hostler.client import calls
from hostler.client.client import Client
from hostler.model.base import utc_now
from hostler.model.errors import NotFound, PeerUnreachable
from hostler.model.job import Job, JobState

pytestmark = pytest.mark.unit

JOB = Job(id="j1", kind="vm.start", target="1", target_name="web1", state=JobState.RUNNING, created=utc_now())
RUNNING = JOB.model_dump_json().encode()
DONE = JOB.but(state=JobState.DONE).model_dump_json().encode()

Answer = bytes | BaseException | type[BaseException]


class Script:
    """Answers the calls one after the other."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def raw(self, call: calls.Call[Any]) -> bytes:
        self.asked.append(f"{call.method} {call.path}")
        answer = self.answers.pop(0)
        if isinstance(answer, bytes):
            return answer
        raise answer

    def close(self) -> None:
        pass


def away() -> PeerUnreachable:
    return PeerUnreachable("host", "no connection", sent=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "RETRY", 0)


Start = Callable[..., tuple[int, Script]]


@pytest.fixture
def start() -> Start:
    def start(*answers: Answer, **options: Any) -> tuple[int, Script]:
        script = Script(*answers)
        settings = Settings(_client=cast(Client, script))
        code = waiting.run_job(settings, calls.vm_act("web1", "start"), wait=True, done="vm web1 is running", **options)
        return code, script

    return start


def test_the_job_is_asked_until_it_is_over(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    code, script = start(RUNNING, RUNNING, DONE)
    assert code == Exit.OK
    assert script.asked == ["POST /v1/vms/web1/start", "GET /v1/jobs/j1", "GET /v1/jobs/j1"]
    assert capsys.readouterr().out == "vm web1 is running\n"


def test_a_restart_of_the_daemon_is_waited_out(start: Start) -> None:
    code, script = start(RUNNING, away(), away(), away(), RUNNING, DONE)
    assert code == Exit.OK
    assert script.answers == []


def test_a_daemon_that_stays_away_is_an_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "RESTART", -1)
    with pytest.raises(PeerUnreachable):
        start(RUNNING, away(), away())


def test_a_daemon_that_forgot_the_job_is_an_error(start: Start) -> None:
    with pytest.raises(NotFound):
        start(RUNNING, away(), NotFound("job j1", "is not known"))


def test_the_start_itself_is_never_repeated(start: Start) -> None:
    """The host may have done it."""
    with pytest.raises(PeerUnreachable):
        start(PeerUnreachable("host", "broke", sent=True), RUNNING, DONE)


def test_ctrl_c_before_the_answer_says_where_to_look(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = start(KeyboardInterrupt)
    assert code == Exit.INTERRUPTED
    assert "hostler job list" in capsys.readouterr().err


def test_ctrl_c_leaves_the_job(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    code, script = start(RUNNING, KeyboardInterrupt)
    assert (code, script.asked[-1]) == (Exit.INTERRUPTED, "GET /v1/jobs/j1")
    assert "hostler job cancel j1" in capsys.readouterr().err


def test_ctrl_c_on_what_cannot_be_cancelled_does_not_advise_it(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    start(JOB.but(cancellable=False).model_dump_json().encode(), KeyboardInterrupt)
    assert "hostler job cancel" not in capsys.readouterr().err


def test_the_second_ctrl_c_cancels_and_waits_for_the_undoing(start: Start) -> None:
    cancelled = JOB.but(state=JobState.CANCELLED).model_dump_json().encode()
    script = Script(RUNNING, KeyboardInterrupt, KeyboardInterrupt, RUNNING, RUNNING, cancelled)
    settings = Settings(_client=cast(Client, script))
    with pytest.raises(Exception, match="was cancelled"):
        waiting.run_job(settings, calls.vm_act("web1", "start"), wait=True, done="", cancel_on_second=True)
    assert script.asked[3] == "POST /v1/jobs/j1/cancel"


def test_a_third_ctrl_c_leaves_even_the_undoing(start: Start) -> None:
    code, _ = start(RUNNING, KeyboardInterrupt, KeyboardInterrupt, RUNNING, KeyboardInterrupt, cancel_on_second=True)
    assert code == Exit.INTERRUPTED


def test_json_is_the_job_as_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(json=True, _client=cast(Client, Script(RUNNING, DONE)))
    waiting.run_job(settings, calls.vm_act("web1", "start"), wait=True, done="never said")
    assert json.loads(capsys.readouterr().out)["state"] == "done"
