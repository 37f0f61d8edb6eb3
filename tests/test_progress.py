"""How far an item of many steps is, in words."""

import re

from avatar_core.progress import StepClock


def test_an_item_without_steps_has_nothing_to_tell() -> None:
    clock = StepClock()
    assert clock.text("a", 0, 1) == ""
    assert clock.text("a", 1, 1) == ""


def test_steps_are_told_with_their_time_from_the_second_on() -> None:
    clock = StepClock()
    assert clock.text("a", 4, 10) == "step 4 of 10"
    assert re.fullmatch(r"step 6 of 10, 0\.0 s each, 0:00 left", clock.text("a", 6, 10))
    assert clock.text("b", 0, 10) == "step 0 of 10"


def test_the_time_left_follows_the_steps_done_here() -> None:
    clock = StepClock()
    clock.text("a", 10, 50)
    begun_s, begun = clock._begun["a"]
    clock._begun["a"] = begun_s - 20, begun
    assert re.fullmatch(r"step 12 of 50, 10\.0 s each, 6:(19|20|21) left", clock.text("a", 12, 50))
    clock.end("a")
    assert clock.text("a", 12, 50) == "step 12 of 50"
