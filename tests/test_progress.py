"""What a log shows of a command's progress."""

import io
import re

from rich.console import Console

from pargs_jax import progress
from pargs_jax.progress import ShownProgress


def shown(monkeypatch, seconds_between_lines, **options):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds_between_lines)
    console = Console(file=io.StringIO(), width=20, **options)
    with ShownProgress(console, "training", 4, done=1) as progress_shown:
        progress_shown.update(2, "loss 0.5")
        progress_shown.update(3, "loss 0.4")
        progress_shown.update(4, "loss 0.25, a note that is longer than a line")
    return console.file.getvalue()


def test_a_log_gets_the_first_note_a_line_now_and_then_and_the_last(monkeypatch):
    assert shown(monkeypatch, 1000).splitlines() == [
        "training 2/4  loss 0.5  0:00:00 left 0:00:00",
        "training 4/4  loss 0.25, a note that is longer than a line  0:00:00 left 0:00:00",
    ]
    assert shown(monkeypatch, 0).splitlines()[1].startswith("training 3/4  loss 0.4  ")


def test_a_terminal_gets_a_bar_and_a_quiet_process_nothing(monkeypatch):
    assert "\r" in shown(monkeypatch, 0, force_terminal=True)
    assert shown(monkeypatch, 0, quiet=True) == ""


def test_80_columns_show_every_number(monkeypatch):
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with ShownProgress(console, "training", 12_000) as progress_shown:
        progress_shown.update(3_400, "loss 0.6931  accuracy 0.512  123,456 tokens/s")
    last = console.file.getvalue().replace("\n", "\r").split("\r")[-2]
    for part in ("training", " 3400/12000 ", "loss 0.6931  accuracy 0.512  123,456 tokens/s", "left", ":"):
        assert part in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last), last
    assert "…" not in last
