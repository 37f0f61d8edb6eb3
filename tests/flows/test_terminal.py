"""What a run without a terminal prints."""

import io

import pytest
from rich.console import Console

from flows import terminal


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


def test_a_long_clip_is_told_now_and_then(output: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    view = terminal.PlainView(Console(file=output))
    view.stage_started("denoise", items=1, cached=0, to_do=1)
    view.item_progress("denoise", "key", 0, 50)
    assert "step" not in output.getvalue()
    monkeypatch.setattr(terminal, "STEPS_TOLD_S", 0.0)
    view.item_progress("denoise", "key", 1, 50)
    view.item_progress("decode", "other", 1, 50)
    view.item_ended("denoise", {"key": "key", "status": "ok"})
    lines = output.getvalue().splitlines()
    assert lines[1].startswith("denoise: step 1 of 50, ")
    assert len(lines) == 2
