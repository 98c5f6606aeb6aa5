"""What a user meets: plain input, options that mean nothing, short prompts, other people's folders (groups U and L)."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from llmkern.errors import UsageError
from llmkern.exchange.importing import default_folder, import_capture
from llmkern.record import replay_cache
from llmkern.record.device.choose import check_device_name
from llmkern.record.options import TraceOptions
from llmkern.runfolder import RunFolder
from llmkern.runfolder.vocabulary import RAPL_COUNTER
from llmkern.session import check_options, prepare
from llmkern.workload.models import find_model
from tests.recorded import DATA
from tests.synthetic import synthetic_run
from tests.test_cli import ROOT, assert_sentence, llmkern

CAPTURE = DATA / "nsys-export-2025.3.sqlite"


@pytest.mark.parametrize("name", ["cuda:x", "cuda:-1", "rocm", "gpu1", "CPU", "", "cuda:", "cuda:99999", "cpu:0"])
def test_a_device_that_is_none_is_refused_by_name(name: str) -> None:
    """U1, U2: cuda:x was a fault of llmkern, rocm and gpu1 silently took CUDA 0, cuda:-1 passed."""
    with pytest.raises(UsageError, match=f"--device '{name}' is none of auto, cpu, cuda and cuda:N"):
        check_device_name(name)


@pytest.mark.parametrize("name", ["", "  "])
def test_no_model_is_not_some_model(name: str) -> None:
    """U2: --model "" ran qwen-tiny."""
    with pytest.raises(UsageError, match="--model is empty"):
        find_model(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int8_threshold": float("nan"), "precision": "int8"}, "--int8-threshold nan"),
        ({"int8_threshold": float("inf"), "precision": "int8"}, "--int8-threshold inf"),
        ({"int8_threshold": 3.0}, "means nothing at --precision bf16"),
        ({"double_quant": True}, "--double-quant .* --precision bf16"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    """U2: they were accepted and nobody said that they did nothing."""
    with pytest.raises(UsageError, match=message):
        check_options(TraceOptions("qwen-tiny", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed", "12345678901234567890123"), ("--seed",)),
        (("--outliers", "100000"), ("--outliers 100000", "256 hidden dimensions")),
        (("--device", "cuda:x"), ("--device 'cuda:x'",)),
        (("--out", ""), ("--out is empty",)),
        (("--model", ""), ("--model is empty",)),
        (("--model", "x" * 300), ("no name of a model and no path",)),
    ],
)
def test_bad_values_are_one_sentence_before_anything_is_written(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    done = llmkern("trace", "--model", "qwen-tiny", "--device", "cpu", "--out", str(out), "--force", *arguments)
    assert_sentence(done, *words)
    assert list(tmp_path.iterdir()) == []


def job(tmp_path: Path, lines: list[object], **options: object) -> object:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    return prepare(TraceOptions("qwen-tiny", device="cpu", prompts=file, out=tmp_path / "run", **options))  # type: ignore[arg-type]


def test_prompts_that_are_left_out_are_told(tmp_path: Path) -> None:
    """U3: of three prompts the first was used at batch 1, unsaid."""
    made = job(tmp_path, ["one", "two", "three"])
    assert "the first 1 of 3 prompts from a file (--batch 1)" in made.prompts.source  # type: ignore[attr-defined]


def test_prompts_are_checked_at_their_own_length(tmp_path: Path) -> None:
    """U3: files were checked as 512 tokens: short ones refused on a small model, long ones let through."""
    model = tmp_path / "model"
    model.mkdir()
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "model_type": "qwen2",
        **tiny,
        "num_key_value_heads": 1,
        "vocab_size": 320,
        "max_position_embeddings": 256,
    }
    (model / "config.json").write_text(json.dumps(config))
    file = tmp_path / "prompts.jsonl"
    options = {"device": "cpu", "weights": "random", "prompts": file, "out": tmp_path / "run", "outliers": 6}
    file.write_text('"a short one"')
    assert prepare(TraceOptions(str(model), **options)).prompts.input_ids.shape == (1, 11)  # type: ignore[arg-type]
    file.write_text(json.dumps("x" * 300))
    with pytest.raises(UsageError, match="300 prompt and 32 new tokens exceed the model's 256 positions"):
        prepare(TraceOptions(str(model), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("line", ['{"messages": "hi"}', '{"messages": {"role": "user"}}', "[" * 3000, '{"prompt": ""}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    """U2: {"messages": "hi"} was taken for a prompt."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"good"\n{line}\n')
    with pytest.raises(UsageError, match="line 2"):
        prepare(TraceOptions("qwen-tiny", device="cpu", prompts=file, out=tmp_path / "run"))


def test_a_separator_of_lines_inside_of_a_text_is_text(tmp_path: Path) -> None:
    made = job(tmp_path, ["one\u2028and the same", "two"], batch=2)
    assert made.prompts.effective_tokens == (18, 3)  # type: ignore[attr-defined]


@pytest.mark.parametrize("weights", ["pickled", "torn", "none"])
def test_weights_that_cannot_be_loaded_are_one_sentence(tmp_path: Path, weights: str) -> None:
    """U11: pickled weights and broken folders ended as a fault of llmkern."""
    from llmkern.workload.load import Source, load_model

    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320}
    (model / "config.json").write_text(json.dumps(config))
    if weights == "pickled":
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04}q\x00.")
    elif weights == "torn":
        (model / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    import torch

    with pytest.raises(UsageError, match=r"weights of .* cannot be loaded .*--weights random"):
        load_model(find_model(str(model)), Source("local"), "fp32", torch.device("cpu"))


def test_importing_over_the_weighed_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L1: import X --energy RUN --out RUN --force deleted the weighed run; the default name invited it."""
    run, _ = synthetic_run(tmp_path / "runs" / "cap")
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    for out in (run.path, run.path / "inside", tmp_path / "runs"):
        with pytest.raises(UsageError, match=r"(is|lies inside|holds) the input"):
            import_capture(CAPTURE, out, energy=run.path, force=True)
    assert {p.name: p.read_bytes() for p in run.path.iterdir()} == before
    monkeypatch.chdir(tmp_path)
    assert default_folder(Path("cap.sqlite"), run.path) == Path("runs/cap-import")
    assert default_folder(Path("cap.sqlite")) == Path("runs/cap")
    # L2: a hidden file has no name before its first dot, and "runs/" was written to, with all runs in it.
    assert default_folder(Path(".cap.sqlite")) == Path("runs/cap")
    assert default_folder(Path(".sqlite")) == Path("runs/sqlite")


def test_a_capture_that_fails_leaves_nothing_and_the_older_run(tmp_path: Path) -> None:
    import_capture(CAPTURE, tmp_path / "run")
    (tmp_path / "torn.sqlite").write_bytes(CAPTURE.read_bytes()[:5000])
    with pytest.raises(UsageError):
        import_capture(tmp_path / "torn.sqlite", tmp_path / "run", force=True)
    assert RunFolder(tmp_path / "run").complete
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "torn.sqlite"]


def test_packages_of_the_host_are_not_renumbered_as_gpus(tmp_path: Path) -> None:
    """L6: with the energy of GPU 0 under a capture of GPU 3, RAPL's package 0 became package 3."""
    from dataclasses import replace

    from llmkern.exchange.importing import _add_energy
    from llmkern.runfolder import RunWriter

    weighed, _ = synthetic_run(tmp_path / "weighed")
    rows = weighed.table("energy")
    packages = rows.assign(sensor=RAPL_COUNTER)
    weighed.table = lambda name, *_a, **_k: (  # type: ignore[method-assign]
        pd.concat([rows, packages]) if name == "energy" else RunFolder(weighed.path).table(name)
    )
    writer = RunWriter(
        tmp_path / "run", replace(weighed.facts, device=replace(weighed.facts.device, index=3), tables={})
    )
    _add_energy(writer, weighed)
    found = RunFolder(writer.path).table("energy").groupby("sensor", observed=True)["device"].unique()
    assert list(found["nvml_total"]) == [3]
    assert list(found[RAPL_COUNTER]) == [0]


def test_a_run_is_not_recorded_into_another(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    before = sorted(p.name for p in run.path.iterdir())
    for out in (run.path / "inside", run.path / "deep" / "inside"):
        with pytest.raises(UsageError, match="lies inside the run folder"):
            import_capture(CAPTURE, out, force=True)
    assert sorted(p.name for p in run.path.iterdir()) == before


@pytest.mark.parametrize("to", ["nsys", "perfetto", "parquet", "csv"])
def test_a_run_of_a_device_that_says_little_is_exported(tmp_path: Path, to: str) -> None:
    from llmkern.exchange.exporting import export_run

    run, _ = synthetic_run(tmp_path / "run", rounds=3, energy=False)
    assert run.facts.device.compute_capability is None
    assert export_run(run.path, to, tmp_path / "out").exists()


def test_a_reader_never_writes(tmp_path: Path) -> None:
    """L4: report wrote into the run: a read-only folder was exit 70, tracked files were rewritten."""
    run, _ = synthetic_run(tmp_path / "run")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.path.iterdir()}
    for file in run.path.iterdir():
        file.chmod(stat.S_IRUSR)
    run.path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        for arguments in (("report", str(run.path)), ("diff", str(run.path), str(run.path), "--json")):
            done = llmkern(*arguments)
            assert done.returncode == 0, done.stderr
    finally:
        run.path.chmod(stat.S_IRWXU)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.path.iterdir()} == before


def test_a_user_without_a_home_has_no_cache_and_a_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """L9: without HOME a finished run ended in exit 70."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nobody(_path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    assert replay_cache.cache_file() is None
    assert replay_cache.load("board").empty
    row = {
        "signature": ["a"],
        "kernel": None,
        "clock_mhz": 1980.0,
        "duty": 0.5,
        "launches": 1.0,
        "seconds": 2.0,
        "dynamic_j": 1.0,
        "floor_w": 120.0,
    }
    replay_cache.store("board", pd.DataFrame(row))


def test_a_cache_of_wrong_types_is_an_empty_one_and_many_writers_lose_nothing(tmp_path: Path) -> None:
    """L9: wrong types were exit 70, and three writers at once kept 57 of 180 updates."""
    file = tmp_path / "replays.parquet"
    pd.DataFrame({name: ["x"] for name in replay_cache.COLUMNS}).to_parquet(file)
    assert replay_cache.load("x", file).empty
    pd.DataFrame({name: [-1.0] for name in replay_cache.COLUMNS}).to_parquet(file)
    assert replay_cache.load("-1.0", file).empty
    row = {
        "kernel": None,
        "clock_mhz": 1980.0,
        "duty": 0.5,
        "launches": 1.0,
        "seconds": 2.0,
        "dynamic_j": 1.0,
        "floor_w": 120.0,
    }

    def one(number: int) -> None:
        replay_cache.store("board", pd.DataFrame({"signature": [f"op {number}"], **row}), file)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(60)))
    assert len(replay_cache.load("board", file)) == 60


def test_doctor_answers_without_pytorch(tmp_path: Path) -> None:
    """U1: doctor, of all commands, needed what it is there to look for."""
    program = """
import sys
sys.modules["torch"] = None
from llmkern.commands import run, command
sys.argv = ["llmkern"]
run(command("doctor"), "llmkern doctor")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "torch cannot be imported" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", sorted(p.name for p in DATA.glob("h100-gap-*")))
def test_a_run_that_is_hardly_one_has_a_report(name: str) -> None:
    """U1: the six recorded gaps of tests/data, which have neither options nor model, were exit 70."""
    done = llmkern("report", str(DATA / name))
    assert done.returncode == 0, done.stderr
    assert "No complete weigh window" in " ".join(done.stdout.split())


@pytest.mark.parametrize("gone", ["device", "options", "model", "prompts", "host", "versions", "recorders"])
def test_a_run_json_that_lacks_something_is_read_or_refused(tmp_path: Path, gone: str) -> None:
    """U1: a run.json without device or options was exit 70."""
    run, _ = synthetic_run(tmp_path / "run", rounds=3)
    facts = json.loads((run.path / "run.json").read_text())
    del facts[gone]
    (run.path / "run.json").write_text(json.dumps(facts))
    done = llmkern("report", str(run.path))
    if gone == "device":
        assert_sentence(done, "run.json", "device")
    else:
        assert done.returncode == 0, done.stderr


def test_a_report_is_a_module_too_and_the_version_is_told() -> None:
    """U7: no python -m llmkern.report, no -o, no --version hint."""
    done = llmkern(str(DATA / "h100-gap-read-back"), module="llmkern.report")
    assert done.returncode == 0, done.stderr
    assert "llmkern, version" in llmkern("--version").stdout
    assert "--version" in llmkern("--help").stdout
    for command in ("trace", "export", "import"):
        assert "-o, --out" in llmkern(command, "--help").stdout
    assert "--html" in llmkern("trace", "--help").stdout


def test_the_module_is_cut_in_its_middle_at_80_columns() -> None:
    """U7: diff and the top gaps cut off what tells one module from another."""
    done = llmkern("diff", str(DATA / "h100-qwen-7b-bf16-operators"), str(DATA / "h100-qwen-7b-int8"), COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert any("gate_proj" in line or "down_proj" in line for line in done.stdout.splitlines())


def test_a_source_distribution_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    """U4: the sdist had neither csrc/ nor CMakeLists.txt."""
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "*.so", "runs", ".whl", "data", "__pycache__", "*.egg-info"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    done = subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"],
        capture_output=True,
        text=True,
        check=False,
        cwd=copy,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-800:]
    with tarfile.open(next((copy / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"CMakeLists.txt", "pyproject.toml", "setup.py", "README.md", "llmkern/report/page/page.html.j2"}
    wanted |= {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir()}
    wanted |= {str(file.relative_to(ROOT)) for file in (ROOT / "llmkern").rglob("*.py")}
    assert wanted <= names, wanted - names
