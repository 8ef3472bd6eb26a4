"""The request to stop: by signals, from elsewhere, in nested contexts and in other threads."""

import signal
import threading

import pytest

from subspan.errors import Stopped
from subspan.training import stop as module
from subspan.training.stop import Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_does_not_wait(number):
    before = signal.getsignal(number)
    told = []
    with Stop(lambda: told.append(number)) as stop, stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert str(stop.error("after 3 steps")) == "stopped after 3 steps"
        with pytest.raises(Stopped, match=r"^stopped at once$") as caught:
            signal.raise_signal(number)
        assert caught.value.signal == stop.error("").signal == number
    assert told == [number]
    assert signal.getsignal(number) == before
    assert stop.requested


def test_contexts_of_one_request_may_be_nested():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        with stop:
            pass
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == before


def test_elsewhere_is_asked_now_and_then(monkeypatch):
    now, asked, answer = [100.0], [], [False]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stop = Stop(elsewhere=lambda: asked.append(now[0]) or answer[0])
    assert [stop.requested for _ in range(3)] == [False] * 3
    answer[0] = True
    assert not stop.requested
    now[0] += module.LOOK_EVERY
    assert stop.requested
    answer[0] = False
    now[0] += 1
    assert stop.requested
    assert asked == [100.0, 100.0 + module.LOOK_EVERY]
    assert stop.error("").signal == signal.SIGTERM


def test_other_threads_cannot_take_signals():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with Stop() as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.requested])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before, False]


def test_handlers_that_are_not_python_s_stay(monkeypatch):
    """A program that has Python inside of it has set them, and Python could not give them back."""
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None)
        stop = Stop()
        stop.__enter__()
    assert signal.getsignal(signal.SIGTERM) == before
    stop.__exit__()
