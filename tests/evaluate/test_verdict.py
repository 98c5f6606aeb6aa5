"""What an evaluation says, from rows with known numbers: four candidates are told apart in their first lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkern.errors import UsageError
from llmkern.evaluate.document import RegressionError, check_baseline, document, read_baseline
from llmkern.evaluate.evaluation import Contender, Evaluation, Request
from llmkern.evaluate.job import Case, Check, Energy, Latency, LaunchedKernel, Row
from llmkern.evaluate.roof import Roof
from llmkern.evaluate.verdict import state
from llmkern.report import evaluation as report
from llmkern.report.console import PlainConsole
from llmkern.report.evaluation_page import page

RIGHT = Check("random", 1.7e-3, 1.0, 0, 0, 100)
CASES = tuple(Case("int8", n, 4096, 1, f"layer {n}") for n in (4096, 16384, 28672))
ROOF = Roof(3.35e12, 3.1e12, 2.4e12, 1.3, None)


def row(name: str, case: Case, cold: float, warm: float, *checks: Check, after: Check = RIGHT, mj: float = 1.0) -> Row:
    kernel = LaunchedKernel("linear<int>", 1.0, cold, (64, 1, 1), (256, 1, 1), 80, 4096, 0, 0.5)
    latency = Latency((cold * 0.99, cold, cold * 1.01), (warm,), cold, True, 9, 1980, (kernel,))
    energy = Energy((mj, mj * 0.9, mj * 1.1), (mj * 1.2, mj * 1.1, mj * 1.3), 120.0, 400.0, 3)
    stored = case.n * case.k * (2 if name == "cuBLAS bf16" else 1)
    return Row(name, case, stored, stored, list(checks or (RIGHT,)), after, latency, energy)


def evaluation(rows: list[Row], failed: dict[str, str] | None = None) -> Evaluation:
    names = dict.fromkeys(r.candidate for r in rows) | dict.fromkeys(failed or {})
    own = tuple(Contender(name, name, name not in ("llmkern", "cuBLAS bf16")) for name in names)
    return Evaluation(Request(own, CASES), "a board", rows, failed or {}, ROOF)


def us(case: Case, rate: float = 3e12, t0: float = 2.0) -> float:
    return t0 + case.n * case.k / rate * 1e6


def verdicts(rows: list[Row], failed: dict[str, str] | None = None) -> dict[str, str]:
    peers = [row("llmkern", case, us(case), us(case) * 0.8) for case in CASES]
    return {v.name: v.sentence for v in state(evaluation(rows + peers, failed)).verdicts}


def test_four_candidates_are_told_apart() -> None:
    wrong = Check("random", 0.5, 0.04, 0, 0, 100)
    half = Check("random", None, None, 0, 50, 100)
    rows = [row("good", case, us(case) * 0.95, us(case) * 0.8) for case in CASES]
    rows += [row("fast", case, us(case) * 0.5, us(case) * 0.4, wrong) for case in CASES]
    rows += [row("warm", case, us(case) * 1.5, us(case) * 0.9) for case in CASES]
    rows += [row("half", case, us(case), us(case), half) for case in CASES]
    told = verdicts(rows)
    assert told["good"].startswith(
        "good: right on 3 inputs; 1.05 × as fast as the fastest peer (llmkern), 69% to 90% of"
    )
    assert told["fast"].startswith("fast: wrong on random inputs: relative L2 0.5 (limit 0.005), 4.0% of values match")
    assert "it is fast (2.00 × llmkern), but that is worth nothing" in told["fast"]
    assert told["warm"].startswith(
        "warm: right on 3 inputs; fast only while its weights are in L2: 11.4 µs cold but 6.8"
    )
    assert told["half"].startswith("half: leaves 50% of its output unwritten (or NaN) on random inputs")


def test_right_before_and_wrong_after_timing_is_wrong() -> None:
    """A kernel that leaves its result in a cache is right once."""
    later = Check("after timing", 0.9, 0.1, 0, 0, 100)
    told = verdicts([row("once", case, us(case), us(case), after=later) for case in CASES])
    assert told["once"].startswith("once: wrong after timing: relative L2 0.9")


def test_how_a_process_ended_is_the_verdict() -> None:
    told = verdicts([], {"crash": "it crashed with SIGSEGV in latency of int8 4096x4096, M = 1."})
    assert told["crash"] == "crash: it crashed with SIGSEGV in latency of int8 4096x4096, M = 1."


def test_a_peer_that_rounds_x_stays_in_and_is_told() -> None:
    rounded = Check("random", 6e-3, 0.999, 0, 0, 100)
    statement = state(
        evaluation([row("cuBLAS bf16", CASES[0], 9.0, 8.0, rounded), row("own", CASES[0], 9.0, 8.0, rounded)])
    )
    assert [line.right for line in statement.lines] == [True, False]
    assert "cuBLAS bf16 rounds x to 8 bits too" in statement.doubts[0]


def test_fixed_cost_and_rate_are_found_again() -> None:
    rows = [row("llmkern", case, us(case, 2.5e12, 3.0), 1.0) for case in CASES]
    (fit,) = state(evaluation(rows)).fits
    assert fit.t0_us == pytest.approx(3.0, rel=1e-6)
    assert fit.bytes_per_s == pytest.approx(2.5e12, rel=1e-6)
    assert fit.misfit < 1e-9
    # Two shapes do not show whether a line fits.
    assert state(evaluation(rows[:2])).fits == ()


def test_shares_count_weight_bytes_of_what_is_read() -> None:
    line = state(evaluation([row("llmkern", CASES[0], 10.0, 8.0)])).lines[0]
    assert line.share_of_sheet == pytest.approx(4096 * 4096 / 10e-6 / 3.35e12)
    assert line.share_of_read == pytest.approx(4096 * 4096 / 10e-6 / 3.1e12)
    assert line.joules_per_gb == pytest.approx(1.2e-3 / (4096 * 4096 / 1e9))
    # What a call reads is the row's to say; a name is a name.
    bf16 = state(evaluation([row("cuBLAS bf16", CASES[0], 10.0, 8.0)])).lines[0]
    assert bf16.share_of_sheet == pytest.approx(2 * 4096 * 4096 / 10e-6 / 3.35e12)


def test_a_baseline_fails_what_is_slower_beyond_its_spread(tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    before = state(evaluation([row("own", case, us(case), 1.0) for case in CASES]))
    file.write_text(json.dumps(document(before)))
    baseline = read_baseline(file)

    def now(factor: float) -> Any:
        return state(evaluation([row("own", case, us(case) * factor, 1.0) for case in CASES]))

    assert len(check_baseline(now(1.02), baseline, 0.03)) == 3
    with pytest.raises(RegressionError, match=r"slower than the baseline by more than 3.0%: own, int8 4096x4096 M=1"):
        check_baseline(now(1.08), baseline, 0.03)
    with pytest.raises(UsageError, match="has none of these candidates"):
        check_baseline(now(1.0), {}, 0.03)
    file.write_text("{}")
    with pytest.raises(UsageError, match="is no evaluation of schema 1"):
        read_baseline(file)


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_and_the_page_say_the_same(width: int) -> None:
    markup = "[red]<b>own</b>"
    rows = [row(markup, case, us(case), us(case)) for case in CASES]
    rows += [row("llmkern", case, us(case), us(case) * 0.8) for case in CASES]
    statement = state(evaluation(rows))
    console = PlainConsole(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print_evaluation(statement, console)
    text = console.export_text()
    # Names of others are text, not markup.
    assert text.startswith("[red]<b>own</b>: right on 3 inputs")
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    html = page(statement)
    assert "&lt;b&gt;own&lt;/b&gt;: right on 3 inputs" in html
    assert "<b>own</b>:" not in html
    for needle in ("7.59", "66%"):
        assert needle in text
        assert needle in html
    assert set(report.tables(statement)) == {"verdicts", "cases", "checks", "launches", "fits", "in_model"}
