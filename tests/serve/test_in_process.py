"""The whole command on the CPU: Transformers' continuous batching, requests that arrive in five ways, none lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkern.runfolder import RunFolder
from llmkern.serve.server import Room

PATTERNS = ("sequential", "burst", "burst:20@1.2", "uniform:0.001-0.02", "fixed:0.01")
REQUESTS = 40


def llmkern(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmkern", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"},
    )


SMALL = (
    *("--model", "qwen-tiny", "--precision", "fp32", "--device", "cpu", "--requests", str(REQUESTS)),
    *("--prompt-tokens", "4-40", "--new-tokens", "2-9"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, object]]]:
    folder = tmp_path_factory.mktemp("serve")
    patterns = [part for pattern in PATTERNS for part in ("--arrivals", pattern)]
    done = llmkern("serve-study", *SMALL, *patterns, "--out", "out", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["missing"] == {}
    return folder / "out" / "runs", {one["pattern"]: one for one in document["arrivals"]}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_request_is_answered_and_every_token_accounted_for(
    runs: tuple[Path, dict[str, dict[str, object]]], pattern: str
) -> None:
    folder, told = runs
    assert told[pattern]["status"] == {"finished": REQUESTS}
    names = {path.name: path for path in folder.iterdir()}
    run = RunFolder(names[pattern.replace(":", "-").replace("@", "-")])
    requests, processed = run.table("requests").set_index("request"), run.table("processed")
    assert len(requests) == REQUESTS
    of_requests = processed[processed["request"] < REQUESTS].groupby("request")
    computed = of_requests[["prefill_tokens", "decode_tokens", "new_tokens"]].sum()
    assert (computed["prefill_tokens"] == requests["prompt_tokens"]).all()
    # The last token of an answer is computed for nobody.
    assert (computed["decode_tokens"] == requests["output_tokens"] - 1).all()
    assert (computed["new_tokens"] == requests["output_tokens"]).all()
    assert (requests["intended_ns"] <= requests["sent_ns"]).all()
    assert (requests["sent_ns"] < requests["first_token_ns"]).all()
    assert (requests["first_token_ns"] <= requests["last_token_ns"]).all()
    iterations = run.table("iterations").sort_values("start_ns")
    assert (iterations["end_ns"].iloc[:-1].to_numpy() <= iterations["start_ns"].iloc[1:].to_numpy()).all()


def test_the_cache_is_as_large_as_the_requests_and_not_as_the_machine() -> None:
    """On the CPU Transformers took 14 GB for a model of 10 MB, and the kernel killed what ran beside it."""
    few = Room((100, 300, 257))
    assert few.least() == {"num_blocks": (1 + 2 + 2) + 3, "max_batch_tokens": 8 * 256}
    assert Room((100,) * 10_000).least()["num_blocks"] == 64 * 2
    assert Room((100,) * 10_000, 512, 8).least() == {"num_blocks": 16, "max_batch_tokens": 512}


def test_requests_share_iterations_when_they_come_together(
    runs: tuple[Path, dict[str, dict[str, object]]],
) -> None:
    _, told = runs
    assert told["sequential"]["mean_batch"] == pytest.approx(1.0)
    assert float(str(told["burst"]["mean_batch"])) > 3
    (run,) = told["sequential"]["runs"]  # type: ignore[misc, attr-defined]
    assert run["window_s"] > 0


def test_what_is_there_is_kept(runs: tuple[Path, dict[str, dict[str, object]]]) -> None:
    folder, _ = runs
    before = (folder / "burst" / "run.json").stat().st_mtime_ns
    again = llmkern("serve-study", *SMALL, "--arrivals", "burst", "--out", "out", cwd=folder.parents[1])
    assert again.returncode == 0, again.stderr
    assert "burst: there already, kept" in again.stderr
    assert "no energy counter could be read" in " ".join(again.stdout.split())
    # Of other requests it is not: that is told, and what is there stays.
    for other in (("--prompt-tokens", "4-41"), ("--seed", "1"), ("--precision", "bf16"), ("--max-batch", "2")):
        refused = llmkern("serve-study", *SMALL, *other, "--arrivals", "burst", "--out", "out", cwd=folder.parents[1])
        assert refused.returncode == 2
        assert "is there and of something else" in refused.stderr
        assert other[1] in refused.stderr
    assert (folder / "burst" / "run.json").stat().st_mtime_ns == before


def test_patterns_are_served_in_rounds(tmp_path: Path) -> None:
    few = ("--requests", "6", "--repeats", "2", "--arrivals", "burst", "--arrivals", "sequential", "--json")
    done = llmkern("serve-study", *SMALL, *few, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = {one["pattern"]: one for one in json.loads(done.stdout)["arrivals"]}
    assert {name: (one["status"], len(one["runs"])) for name, one in told.items()} == {
        name: ({"finished": 12}, 2) for name in ("burst", "sequential")
    }
    names = {path.name for path in (tmp_path / "out" / "runs").iterdir()}
    assert names == {"burst", "burst.run-2", "sequential", "sequential.run-2"}
    # What iterations consist of the first run says.
    assert RunFolder(tmp_path / "out" / "runs" / "burst").has("kernels")
    second = RunFolder(tmp_path / "out" / "runs" / "burst.run-2")
    assert not second.has("kernels") or second.table("kernels").empty
    first = RunFolder(tmp_path / "out" / "runs" / "burst")
    lengths = ["prompt_tokens", "output_tokens"]
    assert first.table("requests")[lengths].equals(second.table("requests")[lengths])


def test_a_run_that_served_is_reported_as_one(runs: tuple[Path, dict[str, dict[str, object]]], tmp_path: Path) -> None:
    folder, _ = runs
    done = llmkern("report", str(folder / "burst"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{REQUESTS} requests" in done.stdout
    page = llmkern("report", str(folder / "burst"), "--html", "page.html", cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    assert "Requests over time: burst" in (tmp_path / "page.html").read_text()
    left = llmkern("collect", str(folder), cwd=tmp_path)
    assert left.returncode == 2
    assert "it served requests" in left.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--arrivals", "fixed:0"), "0 is no rate or interval"),
        (("--arrivals", "burst", "--arrivals", "burst"), "is there twice"),
        (("--prompt-tokens", "9-4"), "the smaller one first"),
        (("--arrivals", "trace:absent.jsonl"), "absent.jsonl cannot be read"),
        (("--model", "qwen-8b"), "no model 'qwen-8b'"),
        (("--find-shape", "--rate", "4", "--p99-ttft", "2s", "--repeats", "3"), "leave --repeats 3 out"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    done = llmkern("serve-study", *SMALL, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", ["sequential", "burst"])
def test_some_requests_come_once_more_with_every_operator_recorded(
    runs: tuple[Path, dict[str, dict[str, object]]], pattern: str
) -> None:
    folder, told = runs
    kinds = {kind["kind"]: kind for kind in told[pattern]["iterations"]}  # type: ignore[attr-defined]
    assert set(kinds) == {"prefill", "decode"}
    for kind in kinds.values():
        assert kind["launches"] > 50
        assert 0 < kind["busy_s"] < kind["span_s"]["value"]
    run = RunFolder(folder / pattern)
    again = run.table("processed")
    again = again[again["request"] > REQUESTS + 4]
    # Four requests, whole, and none of them is one of those that were weighed.
    first = run.table("requests").set_index("request").loc[:3]
    assert again["request"].nunique() == 4
    assert again["new_tokens"].sum() == first["output_tokens"].sum()


def test_what_is_of_something_else_is_told_before_anything_is_served(
    runs: tuple[Path, dict[str, dict[str, object]]],
) -> None:
    folder, _ = runs
    asked = ("--arrivals", "poisson:50", "--arrivals", "burst", "--seed", "3")
    refused = llmkern("serve-study", *SMALL, *asked, "--out", "out", cwd=folder.parents[1])
    assert refused.returncode == 2
    assert "is there and of something else" in refused.stderr
    assert not (folder / "poisson-50").exists()
    assert "Serving" not in refused.stderr
