"""What a run's pages say; that they are on the server is tested with the flow."""

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from flows import run_pages
from flows.run_pages import FAILURES_SHOWN, show_failures


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts of the artifacts that are made."""
    texts: list[str] = []
    monkeypatch.setattr(run_pages, "create_markdown_artifact", lambda text, *more: texts.append(text))
    return texts


def result(*reasons: str) -> Any:
    rows = [
        {"name": f"clip_{n}", "row": n, "failed_stage": "face", "error": reason}
        for n, reason in enumerate(reasons)
    ]
    return SimpleNamespace(
        failures=pd.DataFrame(rows), clips=range(2000), dataset="/data/store/datasets/night"
    )


def test_reasons_are_whole_and_shown_as_they_are(shown: list[str]) -> None:
    show_failures("night-failures", result("column `a|b`: <not a picture>,\nsave it *again*"))
    (text,) = shown
    assert text.startswith(
        "1 of 2000 clips failed, listed in `/data/store/datasets/night/failures.csv`\n\n| clip |"
    )
    reason = r"column \`a\|b\`: \<not a picture\>, save it \*again\*"
    assert text.splitlines()[-1].startswith(rf"| clip\_0 | 1 | face | {reason} | mend the file")


def test_no_failures_have_no_page(shown: list[str]) -> None:
    show_failures("night-failures", result())
    assert not shown


def test_of_very_many_failures_the_first_are_shown(shown: list[str]) -> None:
    show_failures("night-failures", result(*["no face found"] * (FAILURES_SHOWN + 1)))
    (text,) = shown
    assert f"failures.csv`; the first {FAILURES_SHOWN} are below" in text
    assert text.count("no face found") == FAILURES_SHOWN
