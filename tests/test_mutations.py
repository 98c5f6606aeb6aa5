"""Two hundred changed run folders and two hundred flipped bits: read or refused, never wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from bench.mutations import REFUSED, WRONG, make_bases, run_all

COUNTS = (200, 200)


def test_nothing_that_is_changed_behind_our_back_is_exit_70_or_a_wrong_figure(tmp_path: Path) -> None:
    """R20, R21, U10: 142 of 1,742 changed folders gave negative joules, bare NaN or exit 70, 123 of 240 bits others."""
    make_bases(tmp_path)
    found = run_all(tmp_path, 14, COUNTS, 2, thorough=False)
    for name, judged in found.items():
        assert [one for one in judged if one.verdict == WRONG] == [], name
    # Both happen: a validator that refuses everything, or nothing, would be none.
    counts = Counter(one.verdict for one in found["mutants"])
    assert len(counts) == 2, counts
    assert {one.verdict for one in found["flips"]} == {REFUSED}
