"""What is said: progress in lines where there is no terminal, and messages that are shown once."""

import io
import logging
import sys

import pytest

from bsvae_jax._io import downloads, terminal
from bsvae_jax._io.terminal import ProgressBar, log, messages_shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds, advanced by hand."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_in_a_file_progress_is_a_line_every_half_minute(clock, capsys):
    with messages_shown(), ProgressBar(6000, 1000, True) as bar:
        bar.describe("members")
        for _ in range(9):
            clock[0] += 10.0
            bar.show(objective="-12.5")
            bar.update(500)
    assert capsys.readouterr().err.splitlines() == [
        "members: 2,500 of 6,000 images (42 %), 50 images/s, objective -12.5",
        "members: 4,000 of 6,000 images (67 %), 50 images/s, objective -12.5",
        "members: 5,500 of 6,000 images (92 %), 50 images/s, objective -12.5",
    ]


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with messages_shown(), ProgressBar(600, 0, True) as bar:
        bar.update(600)
        log.info("above")
    assert "600/600" in sys.stderr.getvalue().splitlines()[-1]
    assert "above\n" in sys.stderr.getvalue()


def test_no_progress_is_nothing(clock, capsys):
    with ProgressBar(600, 0, False) as bar:
        clock[0] += 100.0
        bar.update(600)
    assert capsys.readouterr().err == ""


def test_messages_are_shown_once_and_say_what_they_are(capsys):
    with messages_shown(), messages_shown():
        log.info("reading 5 % of it")
        log.warning("the disk is slow")
        log.debug("not shown")
    log.info("nor this")
    assert capsys.readouterr().err == "reading 5 % of it\nwarning: the disk is slow\n"


def test_a_console_handler_of_the_program_does_not_repeat_them(capsys):
    root, console, kept = logging.getLogger(), logging.StreamHandler(sys.stderr), io.StringIO()
    file = logging.StreamHandler(kept)
    try:
        root.addHandler(file)
        with messages_shown():
            log.info("kept as well")
        root.addHandler(console)
        with messages_shown():
            log.info("on the console")
    finally:
        root.removeHandler(console)
        root.removeHandler(file)
    assert capsys.readouterr().err == "kept as well\non the console\n"
    assert kept.getvalue() == "kept as well\non the console\n"
    assert (console.filters, log.handlers, log.level) == ([], [], logging.NOTSET)


NOTEBOOK = """
import threading
from bsvae_jax._io.terminal import ProgressBar, log, messages_shown

def work(name):
    with messages_shown(), ProgressBar(100, 0, True, description=name) as bar:
        bar.update(100)
        log.info(f"said by {name}")

work("the cell")
thread = threading.Thread(target=work, args=("a thread",))
thread.start()
thread.join()
"""


@pytest.mark.long
def test_in_a_notebook_progress_is_a_widget_from_another_thread_too():
    """In a real kernel: a display of a widget each, the message beside it, and no bar in characters."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipywidgets")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    shown = [output for output in outputs if output.output_type == "display_data"]
    assert ["application/vnd.jupyter.widget-view+json" in output.data for output in shown] == [True, True]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert said == "said by the cell\nsaid by a thread\n"


def test_a_file_is_downloaded_with_lines(clock, capsys):
    """As pooch drives a bar: by chunks, the last of which is larger than what is left, and the whole size once more."""
    with messages_shown(), ProgressBar(2500, 0, True, "bytes", "downloading weights") as bar:
        driven = downloads._OfPooch(bar, 2500)
        driven.total = 2500
        for _ in range(3):
            clock[0] += 20.0
            driven.update(1000)
        driven.reset()
        driven.update(2500)
        driven.close()
    assert capsys.readouterr().err.splitlines() == ["downloading weights: 2,000 of 2,500 bytes (80 %), 50 bytes/s"]
