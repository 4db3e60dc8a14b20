"""The line between processes that train as one: who is told what, and who is left in peace."""

import queue
import socket
import time

import pytest

from bsvae_jax.distributed import lifeline
from bsvae_jax.distributed.lifeline import DONE, FAILED, Lifeline

SOON = 10.0
"""Seconds in which what must happen happens."""


@pytest.fixture
def told():
    """What the processes that were ended were told."""
    return queue.Queue()


@pytest.fixture
def lines(told):
    """Three processes."""
    first, others = Lifeline(told.put), [Lifeline(told.put) for _ in range(2)]
    place = first.listen()
    for process, other in enumerate(others, 1):
        assert other.connect(place, process)
    yield [first, *others], place
    for line in (first, *others):
        line.leave(DONE)


def until(happened):
    end = time.monotonic() + SOON
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)
    assert happened()


def die(line):
    """As the system closes the connections of a process that is killed."""
    until(lambda: line._lines)
    for held in line._lines:
        held.shutdown(socket.SHUT_RDWR)


def test_a_process_that_dies_ends_the_first_and_the_first_ends_the_others(lines, told):
    (first, one, other), _ = lines
    one._left.set()
    until(lambda: len(first._lines) == 2)
    die(one)
    assert "Process 1 has ended without a word" in told.get(timeout=SOON)
    first._left.set()
    die(first)
    message = told.get(timeout=SOON)
    assert "Process 0 has ended without a word" in message
    assert "Give all of them the same command again" in message
    assert told.empty()
    assert not other._left.is_set()


def test_a_process_that_has_finished_leaves_the_others_in_peace(lines, told):
    (first, one, other), _ = lines
    one.leave(DONE)
    time.sleep(0.2)
    assert told.empty()
    first.leave(DONE)
    time.sleep(0.2)
    assert told.empty()
    other.leave(DONE)


def test_an_error_that_all_have_found_is_said_by_each_alone(lines, told, monkeypatch):
    monkeypatch.setattr(lifeline, "GRACE", 0.5)
    everyone, _ = lines
    for line in everyone:
        line.leave(FAILED)
    time.sleep(1.0)
    assert told.empty()


def test_an_error_of_one_process_ends_those_that_wait_for_it(lines, told, monkeypatch):
    monkeypatch.setattr(lifeline, "GRACE", 0.2)
    (first, one, _), _ = lines
    until(lambda: len(first._lines) == 2)
    one.leave(FAILED)
    assert "Process 1 has stopped with an error, which its own output gives" in told.get(timeout=SOON)


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n  ", bytes(20)], ids=["nothing", "a browser", "another token"])
def test_strangers_are_sent_away(words, lines, told):
    (first, *_), place = lines
    until(lambda: len(first._lines) == 2)
    with socket.create_connection(("localhost", place["port"])) as stranger:
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(64) == b""
    time.sleep(0.1)
    assert len(first._lines) == 2
    assert told.empty()


def test_an_introduction_may_come_in_pieces(lines, told):
    (first, *_), place = lines
    until(lambda: len(first._lines) == 2)
    token = bytes.fromhex(place["token"])
    with socket.create_connection(("localhost", place["port"])) as late:
        late.sendall(token[:7])
        time.sleep(0.3)
        late.sendall(token[7:] + (3).to_bytes(4, "big"))
        assert late.recv(len(token)) == token
        until(lambda: len(first._lines) == 3)
    assert "Process 3 has ended without a word" in told.get(timeout=SOON)


def test_a_port_of_something_else_is_not_taken_for_process_0(told, monkeypatch):
    monkeypatch.setattr(lifeline, "PATIENCE", 0.2)
    with socket.create_server(("localhost", 0)) as other:
        place = {"addresses": ["localhost"], "port": other.getsockname()[1], "token": bytes(range(16)).hex()}
        line = Lifeline(told.put)
        assert not line.connect(place, 1)
    assert not line.connect(place, 1), "nobody listens there any more"
    assert told.empty()


def test_one_process_alone_needs_none(told):
    with lifeline.lifeline(told.put):
        pass
    assert told.empty()
