"""Five hundred changed captures: read or refused in a sentence, never exit 70 or a figure that cannot be."""

from __future__ import annotations

from collections import Counter

from bench.fuzz import READ, REFUSED, WRONG, run_all


def test_no_changed_capture_is_exit_70_or_a_wrong_figure() -> None:
    found = run_all(17, 500, 2)
    assert [one for one in found if one.verdict == WRONG] == []
    # Both happen: what refuses everything, or nothing, would be no reader.
    assert set(Counter(one.verdict for one in found)) == {READ, REFUSED}
