"""The command line as a user meets it: sentences, exit codes, no tracebacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pandas as pd
import pytest
import torch

from llmkern.commands import cli
from llmkern.runfolder import RunFolder
from tests.synthetic import synthetic_run

ROOT = Path(__file__).parents[1]


def llmkern(*arguments: str, module: str = "llmkern", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"} | environment,
    )


def assert_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """A failure is one line on stderr that holds *words*, an exit code, and no traceback."""
    assert done.returncode not in (0, 1, 70), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The main command on the CPU, small."""
    out = tmp_path_factory.mktemp("cli") / "run"
    done = llmkern(
        *("--model", "qwen-tiny", "--precision", "bf16", "--device", "cpu", "--out", str(out)),
        *(
            "--prompt-tokens",
            "24",
            "--new-tokens",
            "16",
            "--warmup",
            "1",
            "--repeats",
            "6",
            "--unweighed-window-s",
            "0.2",
        ),
        module="llmkern.trace",
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_main_command_gives_a_full_report_on_the_cpu(tiny_run: tuple[Path, str]) -> None:
    out, text = tiny_run
    for words in ("qwen-tiny bf16", "decode, per token", "operators launched", "aten.", "Top gaps of decode", str(out)):
        assert words in text
    assert {p.name for p in out.iterdir()} >= {"run.json", "kernels.parquet", "ranges.parquet", "attribution.parquet"}


def test_the_report_can_be_printed_again(tiny_run: tuple[Path, str]) -> None:
    out, text = tiny_run
    again = llmkern("report", str(out))
    assert again.returncode == 0
    assert again.stdout == text


def test_every_result_can_be_had_as_json(tiny_run: tuple[Path, str]) -> None:
    out = str(tiny_run[0])
    for arguments, name in (
        (("report", out, "--json"), "report"),
        (("diff", out, out, "--json"), "diff"),
        (("doctor", "--json"), "doctor"),
        (("models", "--json"), "models"),
    ):
        done = llmkern(*arguments)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert (document["schema"], document["document"]) == (2, name)


def test_a_run_is_compared_with_another(tiny_run: tuple[Path, str]) -> None:
    done = llmkern("diff", str(tiny_run[0]), str(tiny_run[0]))
    assert done.returncode == 0, done.stderr
    for words in ("before: qwen-tiny bf16", "Decode, per token:", "Kernels by kind, gaps by cause", "By module"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert_sentence(llmkern("diff", str(tiny_run[0]), "nowhere"), "nowhere is not a run folder")
    refused = llmkern("diff", str(tiny_run[0]), str(tiny_run[0]), "--against", "magic")
    assert_sentence(refused, "predicts nothing called magic")


def test_the_page_and_the_tables_of_a_run_are_written(tiny_run: tuple[Path, str], tmp_path: Path) -> None:
    page, tables = tmp_path / "page.html", tmp_path / "tables"
    done = llmkern(
        "report", str(tiny_run[0]), "--html", str(page), "--csv", str(tables), "--baseline", str(tiny_run[0])
    )
    assert done.returncode == 0, done.stderr
    assert f"Wrote {page}" in done.stderr
    assert "A decoded token takes" in page.read_text()
    assert {"phases.csv", "kinds.csv", "operators.csv"} <= {file.name for file in tables.iterdir()}
    (tmp_path / "file").write_text("")
    assert_sentence(
        llmkern("report", str(tiny_run[0]), "--html", str(tmp_path / "file" / "p.html")), "choose another file"
    )
    inside = llmkern("report", str(tiny_run[0]), "--html", str(tiny_run[0] / "page.html"))
    assert_sentence(inside, "--html", "lies inside the input")
    assert_sentence(llmkern("report", str(tiny_run[0]), "--baseline", str(tiny_run[0])), "--baseline needs --html")


def test_a_graph_engine_without_a_gpu_is_one_sentence(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    options = ("--model", "qwen-tiny", "--device", "cpu", "--engine", "graph", "--out", str(tmp_path / "run"))
    assert_sentence(llmkern("trace", *options), "needs a GPU", "--engine eager")
    assert not (tmp_path / "run").exists()


def test_run_json_holds_no_environment(tiny_run: tuple[Path, str]) -> None:
    text = (tiny_run[0] / "run.json").read_text()
    for key, value in os.environ.items():
        if len(value) > 12 and key not in ("PWD", "OLDPWD", "VIRTUAL_ENV", "PYTHONPATH") and value not in sys.argv[0]:
            assert f'"{value}"' not in text


def test_layers_and_tokens_are_annotated(tiny_run: tuple[Path, str]) -> None:
    ranges = RunFolder(tiny_run[0]).table("ranges")
    traced = ranges[ranges["pass"] == "time"]
    # Two, or one where a slow machine takes long for it.
    generations = (traced["category"] == "generate").sum()
    assert generations in (1, 2)
    assert (traced["category"] == "layer").sum() == generations * 16 * 4
    assert sorted(traced[traced["category"] == "token"]["token"].unique()) == list(range(16))
    assert not (ranges[ranges["pass"] == "weigh"]["category"] == "layer").any()


def test_an_unknown_model_offers_the_nearest() -> None:
    assert_sentence(llmkern("trace", "--model", "qwen-7x"), "qwen-7x", "qwen-7b")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu() -> None:
    assert_sentence(llmkern("trace", "--model", "qwen-tiny", "--device", "cuda"), "--device cuda", "--device cpu")


def killed_while_timing(out: Path, *arguments: str) -> int:
    """Start a run that would time for hours, kill it with SIGKILL once it has, and return when, in ns."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "llmkern.trace", "--model", "qwen-tiny", "--out", str(out), "--quiet"),
            *("--trace-repeats", "100000", *arguments),
        ],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    partial = out.with_name(f"{out.name}.partial")
    try:
        deadline_s = time.monotonic() + 240
        while len(list(partial.glob("segments/kernels-*.parquet"))) < 3 or not decoded(partial):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        return time.time_ns()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def decoded(partial: Path) -> bool:
    """Return whether a whole decode was recorded: on a slow machine three segments may end in the first prefill."""
    parts = [pd.read_parquet(part) for part in partial.glob("segments/ranges-*.parquet")]
    return any(
        ((part["pass"] == "time") & (part["category"] == "phase") & (part["phase"] == "decode")).any() for part in parts
    )


def assert_readable_until(killed_ns: int, out: Path, *tables: str) -> None:
    """What is there reaches to the last time that the pump wrote, which a busy machine may delay but not skip."""
    run = RunFolder(out)
    assert run.status == "killed"
    last_look_ns = run.table("clocks")["timestamp_ns"].max()
    for table in tables:
        # A buffer of CUPTI holds up to a second of kernels; what the pump drained is there whole.
        assert (last_look_ns - run.table(table)["end_ns"].max()) / 1e9 < 2, table
    done = llmkern("report", str(out))
    assert done.returncode == 0
    assert "This run is incomplete" in done.stdout
    # On a busy machine decode may not be known by difference; its kernels are there all the same.
    assert "prefill, per call" in done.stdout or "decode, per token" in done.stdout


def test_kill_9_leaves_a_readable_run(tmp_path: Path) -> None:
    """U5: on a slow machine this test failed; now it waits for what was written and not for a time."""
    out = tmp_path / "run"
    # Tokens enough that a busy machine cannot hide their time: with few of them decode is not known by difference.
    small = ("--prompt-tokens", "16", "--warmup", "1", "--new-tokens", "64", "--repeats", "3")
    killed_ns = killed_while_timing(out, "--device", "cpu", *small)
    assert not out.exists()
    assert_readable_until(killed_ns, out, "kernels", "ranges")


def test_a_broken_prompt_line_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "good"}\n{"prompt": \n')
    out = tmp_path / "run"
    done = llmkern("trace", "--model", "qwen-tiny", "--device", "cpu", "--prompts", str(file), "--out", str(out))
    assert_sentence(done, "line 2")
    assert not out.exists(), "a broken prompt file should be found before anything is recorded"


def test_an_existing_folder_is_not_overwritten(tiny_run: tuple[Path, str]) -> None:
    done = llmkern("trace", "--model", "qwen-tiny", "--device", "cpu", "--out", str(tiny_run[0]))
    assert_sentence(done, "--force")


def test_more_memory_than_there_is(tmp_path: Path) -> None:
    done = llmkern(
        *("trace", "--model", "llama-70b", "--precision", "fp32", "--device", "cpu", "--weights", "random"),
        *("--out", str(tmp_path / "run")),
    )
    assert_sentence(done, "GiB")
    assert not (tmp_path / "run").exists()


def test_too_long_a_prompt(tmp_path: Path) -> None:
    done = llmkern(
        *("trace", "--model", "qwen-tiny", "--device", "cpu", "--prompt-tokens", "99999"),
        *("--out", str(tmp_path / "r")),
    )
    assert_sentence(done, "positions")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert_sentence(llmkern("report", str(tmp_path)), "not a run folder")


@pytest.mark.parametrize("option", ["--precision=int3", "--batch=0", "--new-tokens=1", "--weights=mine"])
def test_bad_options_are_refused_by_name(option: str) -> None:
    done = llmkern("trace", "--model", "qwen-tiny", option)
    assert done.returncode == 2
    assert option.partition("=")[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_and_models_answer_on_any_machine() -> None:
    doctor = llmkern("doctor")
    assert doctor.returncode == 0, doctor.stderr
    assert all(word in doctor.stdout for word in ("CUPTI", "NVML", "RAPL", "transformers"))
    models = llmkern("models")
    assert "qwen-7b" in models.stdout
    assert "meta-llama/Llama-3.1-70B-Instruct" in models.stdout


@pytest.mark.parametrize("command", ["", *sorted(cli.list_commands(click.Context(cli)))])
def test_help_fits_80_columns(command: str) -> None:
    done = llmkern(*command.split(), "--help", COLUMNS="80")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage:")
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    synthetic_run(tmp_path / "run")
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m llmkern report {tmp_path / 'run'} | head -1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr
    assert done.stderr == ""


def test_nothing_is_confused_by_running_from_the_repository_root() -> None:
    # transformers and bitsandbytes look for a package "kernels" of their own on the path.
    done = subprocess.run(
        [sys.executable, "-c", "import transformers, bitsandbytes; import llmkern.workload.load"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
