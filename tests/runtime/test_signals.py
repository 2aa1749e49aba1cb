import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from comkd_cli.runtime import signals
from comkd_cli.runtime.signals import STOP_REQUESTS, Stopped, stop_requests, stopping_at_once


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def wait_for(requested: Callable[[], int | None]) -> int | None:
    """The requested exit code, once the interpreter has handled the signal."""
    deadline = time.monotonic() + 10
    while requested() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return requested()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_request_with_the_status_that_shells_report(number: signal.Signals, code: int) -> None:
    with stop_requests() as requested:
        assert requested() is None
        send(number)
        assert wait_for(requested) == code
        assert requested() == code  # a call does not reset it


@pytest.mark.parametrize("number", STOP_REQUESTS)
def test_a_signal_that_comes_twice_at_once_is_one_request(number: signal.Signals) -> None:
    with stop_requests() as requested:
        send(number)
        send(number)  # as `timeout` and launchers send it to the process and to its group
        time.sleep(0.05)  # the step that is saved
        assert requested() == 128 + number


def test_a_later_ctrl_c_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "TOGETHER_SECONDS", 0.01)
    with pytest.raises(KeyboardInterrupt), stop_requests() as requested:  # noqa: PT012 - it must come from the second
        send(signal.SIGINT)
        assert wait_for(requested) == 130
        time.sleep(0.02)
        send(signal.SIGINT)
        time.sleep(10)


def test_the_first_request_counts_where_two_kinds_come() -> None:
    with stop_requests() as requested:
        send(signal.SIGTERM)
        assert wait_for(requested) == 143
        send(signal.SIGINT)
        time.sleep(0.05)
        assert requested() == 143


SECOND_SIGTERM = """
import os, signal, time
from comkd_cli.runtime import signals
signals.TOGETHER_SECONDS = 0.05
with signals.stop_requests() as requested:
    os.kill(os.getpid(), signal.SIGTERM)
    while requested() is None:
        time.sleep(0.001)
    print("requested", requested(), flush=True)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""


def test_a_later_sigterm_ends_the_process_as_it_would_without_the_block() -> None:
    command = [sys.executable, "-c", SECOND_SIGTERM]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "requested 143\n")


def own_handler(_number: int, _frame: object) -> None:
    """A handler that was there before."""


@pytest.fixture
def own_handlers() -> object:
    """Handlers of the program around the block, put back after the test."""
    before = {number: signal.signal(number, own_handler) for number in STOP_REQUESTS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_handlers")
def test_the_handlers_before_are_the_handlers_after() -> None:
    with stop_requests():
        assert all(signal.getsignal(number) is not own_handler for number in STOP_REQUESTS)
    assert all(signal.getsignal(number) is own_handler for number in STOP_REQUESTS)


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("number", STOP_REQUESTS)
def test_the_handlers_come_back_after_a_request_and_after_a_failure(number: signal.Signals) -> None:
    with pytest.raises(RuntimeError, match="stopped"), stop_requests() as requested:  # noqa: PT012
        send(number)
        wait_for(requested)
        raise RuntimeError("stopped")
    assert all(signal.getsignal(each) is own_handler for each in STOP_REQUESTS)


def test_a_block_within_a_block_leaves_the_outer_one_active() -> None:
    with stop_requests() as outer:
        with stop_requests() as inner:
            send(signal.SIGINT)
            assert wait_for(inner) == 130
        assert outer() is None
        send(signal.SIGINT)
        assert wait_for(outer) == 130


def test_outside_the_main_thread_nobody_can_ask_and_nothing_is_changed() -> None:
    before = [signal.getsignal(number) for number in STOP_REQUESTS]
    answers: list[object] = []

    def work() -> None:
        with stop_requests() as requested:
            answers.append(requested())
            answers.append([signal.getsignal(number) for number in STOP_REQUESTS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [None, before]


# --- at once -------------------------------------------------------------------------------------------

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send_and_wait(number: signal.Signals) -> None:
    send(number)
    time.sleep(10)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_the_block_with_cleanup_and_the_status_that_shells_report(number: signal.Signals) -> None:
    cleaned = []
    with pytest.raises(Stopped) as caught, stopping_at_once():  # noqa: PT012
        try:
            send(number)
            time.sleep(10)
        finally:
            send(number)  # as `timeout` sends it twice: the cleanup continues
            time.sleep(0.01)
            cleaned.append(True)
    assert caught.value.exit_code == 128 + number
    assert cleaned == [True]
    assert isinstance(caught.value, KeyboardInterrupt)
    assert not isinstance(caught.value, Exception)  # which libraries catch


def test_a_stop_that_a_library_swallowed_is_raised_by_the_check() -> None:
    with stopping_at_once() as check:
        check()
        with pytest.raises(Stopped):  # the library
            send_and_wait(signal.SIGTERM)
        with pytest.raises(Stopped) as caught:
            check()
    assert caught.value.exit_code == 143


@pytest.mark.usefixtures("own_handlers")
def test_a_block_that_stops_at_once_puts_the_handlers_back() -> None:
    with pytest.raises(Stopped), stopping_at_once():
        send_and_wait(signal.SIGTERM)
    assert all(signal.getsignal(number) is own_handler for number in STOP_REQUESTS)


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopping_at_once():
            send(signal.SIGHUP)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGHUP, before)


LATE_SIGTERM = """
import os, signal, time
from comkd_cli.runtime import signals
signals.TOGETHER_SECONDS = 0.05
with signals.stopping_at_once():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    finally:
        print("cleaning", flush=True)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
"""


def test_a_later_signal_ends_a_cleanup_that_hangs() -> None:
    command = [sys.executable, "-c", LATE_SIGTERM]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "cleaning\n")


def test_outside_the_main_thread_nothing_is_changed() -> None:
    before = [signal.getsignal(number) for number in STOPS]
    found: list[object] = []

    def work() -> None:
        with stopping_at_once() as check:
            check()
            found.append([signal.getsignal(number) for number in STOPS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
