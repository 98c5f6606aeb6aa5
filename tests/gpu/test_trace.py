"""The main command on a GPU: every precision, and what may go wrong on the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmkern import session
from llmkern.attribute.attribution import attribute
from llmkern.errors import OutOfMemoryError
from llmkern.progress import Stages
from llmkern.record.options import TraceOptions
from llmkern.runfolder import RunFolder
from tests.test_cli import ROOT, assert_readable_until, assert_sentence, killed_while_timing, llmkern

SMALL = ("--quick", "--prompt-tokens", "48", "--new-tokens", "6", "--warmup", "2", "--repeats", "2")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_a_run_at_each_precision_closes_its_books(tmp_path: Path, precision: str) -> None:
    options = TraceOptions(
        "qwen-tiny",
        precision=precision,
        device="cuda",
        prompt_tokens=48,
        new_tokens=6,
        warmup=2,
        repeats=2,
        quick=True,
        out=tmp_path / "run",
    )
    run = RunFolder(session.trace(options, Stages(quiet=True)))
    found = attribute(run)
    recorder = run.facts.recorder
    assert recorder is not None
    assert recorder.lost == 0
    assert recorder.launches > 0
    for account in found.accounts.values():
        energy = account.weight.energy_j
        assert energy is not None
        assert account.kernel_j is not None
        assert account.gap_j is not None
        rows = found.frame[found.frame["phase"] == account.phase]
        assert rows["energy_j"].sum() == pytest.approx(energy.value)
    assert found.weighed is not None
    assert found.weighed.floor is not None
    assert found.weighed.floor.at(None).value > 40
    assert found.timeline.outside == 0
    if precision != "int8":
        # The same kernels run in every decode step; LLM.int8() takes another path where it meets an outlier.
        tokens = found.timeline.kernels.groupby(["instance", "token"]).size()
        assert tokens.loc[:, 2:].nunique() <= 2


def test_kill_9_leaves_what_was_recorded_until_then(tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed_ns = killed_while_timing(out, "--device", "cuda", "--quick", "--prompt-tokens", "48", "--repeats", "1")
    assert_readable_until(killed_ns, out, "ranges", "kernels")
    assert len(RunFolder(out).table("launches")) > 0


def test_out_of_memory_is_found_before_anything_is_built(tmp_path: Path) -> None:
    done = llmkern(
        *("trace", "--model", "llama-70b", "--precision", "fp32", "--weights", "random", "--out", str(tmp_path / "run"))
    )
    assert_sentence(done, "GiB", "--precision int8 or int4")


def test_out_of_memory_on_the_way_is_a_sentence_and_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "check_memory", lambda *_: None)
    options = TraceOptions("qwen-0.5b", weights="random", batch=3000, prompt_tokens=4000, out=tmp_path / "run")
    with pytest.raises(OutOfMemoryError, match=r"ran out of memory: this run needs about .* GiB"):
        session.trace(options, Stages(quiet=True))
    # Nothing was recorded before the first generation failed, or the sensor test was and says how it ended.
    left = list(tmp_path.iterdir())
    assert all(RunFolder(folder).status == "failed" for folder in left)


def test_a_profiler_in_the_process_keeps_what_was_weighed(tmp_path: Path) -> None:
    # In a process of its own, because torch.profiler keeps CUPTI until the process ends.
    out = tmp_path / "run"
    program = f"""
import sys, torch
from llmkern.commands import command, run
sys.argv = ["trace", "--model", "qwen-tiny", "--out", {str(out)!r}, *{SMALL!r}]
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
    torch.ones(1, device="cuda")
    run(command("trace"), "trace")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 3, done.stderr
    assert "another profiler" in done.stderr
    assert "Traceback" not in done.stderr
    assert RunFolder(out).facts.status == "failed"
    again = llmkern("report", str(out))
    assert again.returncode == 0
    assert "another profiler" in again.stdout
    assert "decode" in again.stdout


def test_under_nsys_the_sentence_names_it(tmp_path: Path) -> None:
    nsys = shutil.which("nsys")
    if nsys is None:
        pytest.skip("nsys is not installed")
    trace = [sys.executable, "-m", "llmkern.trace", "--model", "qwen-tiny", "--out", str(tmp_path / "run"), *SMALL]
    profile = [nsys, "profile", "-t", "cuda,nvtx", "-s", "none", "--cpuctxsw=none", "--wait=primary"]
    done = subprocess.run(
        [*profile, "-o", str(tmp_path / "report"), *trace],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
    text = done.stdout + done.stderr
    assert "another profiler" in text
    assert "Traceback" not in text
