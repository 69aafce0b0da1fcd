"""The sentences that users see."""

from __future__ import annotations

from etude.errors import brief, unknown


def test_an_unknown_name_is_answered_by_what_there_is() -> None:
    known = ["sd15-ddpo", "emoji-ddpo"]
    near, far = str(unknown("recipe", "emoji-dpo", known)), str(unknown("recipe", "qqq", known))
    assert near == "unknown recipe 'emoji-dpo': did you mean 'emoji-ddpo'? the choices are emoji-ddpo, sd15-ddpo."
    assert far == "unknown recipe 'qqq': the choices are emoji-ddpo, sd15-ddpo."
    assert str(unknown("embedded model", "x", [])) == "unknown embedded model 'x': there is none to choose from."


def test_a_long_text_is_cut_to_one_line() -> None:
    assert brief(ValueError("a\n  b")) == "a b"
    assert brief(ValueError("x" * 400), limit=10) == "xxxxxxx..."
