"""An operator's day, step by step; `python -m tests.flows.walk` shows it."""

from pathlib import Path

import pytest

from tests.flows.walk import walk_in


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_an_operators_day(tmp_path: Path) -> None:
    walk_in(tmp_path)
