"""Captures of people who do this job, each a small input of what was read wrong once, with what is right.

The inputs in tests/data/captures are made up; each stands for public captures or issues, named in its test.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from llmkern.attribute.attribution import Attribution, attribute
from llmkern.errors import UsageError
from llmkern.exchange.exporting import Request, export_run
from llmkern.exchange.importing import import_capture
from llmkern.exchange.sound import sound
from llmkern.explain import Explanation
from llmkern.explain.compare import compare
from llmkern.explain.doubts import doubts
from llmkern.explain.statement import state
from llmkern.runfolder import RunFolder
from tests.recorded import DATA
from tests.test_cli import llmkern
from tests.traces import event, kernel, work, written

CAPTURES = DATA / "captures"
NSYS = DATA / "nsys-export-2025.3.sqlite"
US = 1_000


def found(tmp_path: Path, name: str, *phases: str, energy: Path | None = None) -> Attribution:
    (path,) = CAPTURES.glob(name)
    return attribute(import_capture(path, tmp_path / "run", phases=phases, energy=energy, force=True))


def told(attribution: Attribution) -> str:
    return " ".join(doubts(attribution.run, attribution))


def figures(attribution: Attribution, phase: str) -> tuple[int, int, int]:
    """Return the kernels, busy ns and gap ns of *phase*."""
    rows = attribution.timeline.phases[attribution.timeline.phases["phase"] == phase]
    return int(rows["kernels"].sum()), int(rows["busy_ns"].sum()), int(rows["gap_ns"].sum())


def kinds(attribution: Attribution, phase: str) -> dict[str, int]:
    rows = attribution.kernels_of(phase)
    return {str(kind): int(n) for kind, n in rows.groupby("kind", observed=True)["launches"].sum().items() if n}


def test_a_capture_without_phases_keeps_its_first_kernel(tmp_path: Path) -> None:
    """48 of 58 public captures lost at least one kernel, six all of them (lsaeteurn/vectoraddition, TraceLens)."""
    assert figures(found(tmp_path, "01*/trace.json"), "capture") == (5, 920 * US, 61 * US)


def test_one_graph_launch_before_its_kernels_is_no_empty_report(tmp_path: Path) -> None:
    """TraceLens vllm_decode_full, HTA triton_example: all kernels come from a launch before the first of them."""
    attribution = found(tmp_path, "02*/trace.json")
    assert figures(attribution, "capture") == (5, 47_500, 2_000)
    assert export_run(attribution.run.path, "perfetto", tmp_path / "out.json.gz").exists()


def test_microseconds_since_1970_are_exact(tmp_path: Path) -> None:
    """Kineto before PyTorch 2.4: a double steps by 256 ns there (HTA ns_resolution_trace, kineto#853)."""
    assert figures(found(tmp_path, "03*/ns.json"), "decode") == (50, 245_000, 4_900)
    attribution = found(tmp_path, "03*/us.json")
    assert figures(attribution, "decode") == (50, 250 * US, 0)
    assert "start of the trace" not in told(attribution)


@pytest.mark.parametrize(
    ("name", "gap_us", "why"), [("zero", 200, "without times"), ("before", 100, "that began before they were launched")]
)
def test_kernels_without_times_are_left_out_and_told(tmp_path: Path, name: str, gap_us: int, why: str) -> None:
    """CUPTI hands back such (kineto#109, pytorch#188481, pytorch#192021); one stretched a phase to days."""
    attribution = found(tmp_path, f"04*/{name}.json")
    assert figures(attribution, "capture") == (3, 150 * US, gap_us * US)
    assert f"Left out: 1 GPU record {why}" in told(attribution)


def test_no_correlation_joins_nothing(tmp_path: Path) -> None:
    """roctracer#100: all RCCL kernels have correlation 0, and so have calls that launch nothing."""
    attribution = found(tmp_path, "05*/trace.json")
    assert set(attribution.gaps["cause"].astype(str)) == {"unknown"}


def test_of_nested_ranges_of_one_phase_the_outermost_counts(tmp_path: Path) -> None:
    """HTA critical_path/alexnet: a wrapper annotates too; all behind the inner range was lost."""
    attribution = found(tmp_path, "07*/trace.json")
    assert figures(attribution, "decode") == (9, 450 * US, 400 * US)
    assert "the outermost counts" in told(attribution)


def test_phases_that_overlap_are_told(tmp_path: Path) -> None:
    """nsys-ai#307: two requests in flight, prefill and decode at once."""
    attribution = found(tmp_path, "08*/trace.json")
    assert figures(attribution, "prefill")[0] == figures(attribution, "decode")[0] == 5
    assert "Phases overlap" in told(attribution)


def test_a_range_may_have_an_equals_sign(tmp_path: Path) -> None:
    """SGLang names its steps "step[DECODE bs=32]" (sglang#24911)."""
    for asked in ("step[DECODE bs=32]=decode", "step[DECODE bs=32]"):
        phase = "decode" if asked.endswith("=decode") else asked
        assert figures(found(tmp_path, "09*/trace.json", asked), phase)[0] == 3


def test_norms_and_attention_convert_nothing(tmp_path: Path) -> None:
    """TraceLens sglang_prefilldecode: 253 of 533 launches were said to convert numbers, in a bf16 model."""
    assert kinds(found(tmp_path, "11*/trace.json"), "decode") == {"norm": 6, "attention": 3, "gemm": 3}


def test_copies_that_change_no_dtype_are_no_casts(tmp_path: Path) -> None:
    """TraceLens h100/owlv2: 735 launches of gpu_kernel_impl_nocast<direct_copy_kernel_cuda>."""
    assert kinds(found(tmp_path, "12*/trace.json"), "decode") == {"copy": 6}


def test_kinds_of_real_names(tmp_path: Path) -> None:
    """HTA and TraceLens: softmax, Triton norms, upsampling, TensorRT-LLM, vLLM's cache, fbgemm, NCCL."""
    attribution = found(tmp_path, "13*/trace.json")
    rows = attribution.kernels_of(str(next(iter(attribution.accounts))))
    of = {str(name): str(kind) for name, kind in zip(rows["name"], rows["kind"], strict=True)}

    def kind(part: str) -> str:
        (one,) = {found for name, found in of.items() if part in name}
        return one

    assert kind("cunn_SoftMax") == "reduce"
    assert kind("fused_add_rms_norm") == "norm"
    assert kind("upsample") != "sampling"
    assert kind("bmm_Mx") == "gemm"
    assert kind("fbgemm") != "gemm"
    assert kind("quantize_with_block_size") == "quantize"
    assert kind("reshape_and_cache_flash") == "copy"
    assert kind("AllReduce") == "communication"


def test_a_range_without_an_end_goes_on_to_the_end(tmp_path: Path) -> None:
    """aws-ofi-nccl#1284: collection stopped inside the range; 60 % of ranges were unclosed."""
    attribution = found(tmp_path, "18*/cap.sqlite")
    assert figures(attribution, "decode")[0] == 6
    assert "have no end (decode)" in told(attribution)


def test_a_kernel_that_ends_before_it_begins_is_left_out(tmp_path: Path) -> None:
    attribution = found(tmp_path, "19*/cap.sqlite")
    assert "Left out: 1 GPU record without an end" in told(attribution)
    assert (attribution.timeline.kernels["end_ns"] >= attribution.timeline.kernels["start_ns"]).all()


def test_pages_of_unified_memory_have_names(tmp_path: Path) -> None:
    """lsaeteurn/vectoraddition: 4,608 copies of kinds 11 to 13."""
    names = set(found(tmp_path, "20*/cap.sqlite").timeline.kernels["name"].astype(str))
    assert {f"memcpy UVM {way}" for way in ("HtoD", "DtoH", "DtoD")} <= names


@pytest.mark.parametrize("name", ["bom", "space", "utf16", "control", "newline"])
def test_what_is_nearly_json_is_read(tmp_path: Path, name: str) -> None:
    """perfetto#598, pytorch#113001, PowerShell's redirection."""
    assert len(found(tmp_path, f"23*/{name}.json").timeline.kernels)


def test_json_of_nsys_is_called_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"JSON of Nsight Systems.*--type sqlite"):
        found(tmp_path, "21*/cap.json")


def test_a_broken_name_is_shown(tmp_path: Path) -> None:
    """kineto#336, pytorch#98432: backslashes of Windows paths."""
    with pytest.raises(UsageError, match=r"no JSON at character \d+ .*behind '"):
        found(tmp_path, "23*/backslash.json")


def test_streams_that_overlap_are_told(tmp_path: Path) -> None:
    """TraceLens mi300/resnet_act_checkpoint: 101.6 % of a phase in one kind."""
    attribution = found(tmp_path, "14*/a.json")
    assert "Kernels of 2 streams overlap for 425 µs" in told(attribution)
    (path,) = CAPTURES.glob("14*/b.json")
    (difference,) = compare(attribution, attribute(import_capture(path, tmp_path / "other")))
    bars = difference.bars.set_index(["part", "name"])["change_s"]
    assert bars["overlap", "overlap of kernels"] == pytest.approx(425e-6)
    assert bars["residual", "residual"] == 0


def test_any_phase_can_be_cut_out(tmp_path: Path) -> None:
    attribution = found(tmp_path, "15*/a.json", "generate")
    out = export_run(attribution.run.path, "perfetto", tmp_path / "out.json.gz", Request(phase="generate"))
    assert out.exists()


def test_categories_of_old_pytorch_are_known(tmp_path: Path) -> None:
    """kineto's tb_plugin samples of 2021: Kernel, Memcpy, Runtime."""
    assert len(found(tmp_path, "22*/trace.json").timeline.kernels) == 3


def test_energy_where_nothing_is_identified(tmp_path: Path) -> None:
    """TraceLens vllm_decode_full: compiled kernels with names of their own, weighed eagerly."""
    attribution = found(tmp_path, "24*/trace.json", energy=DATA / "h100-qwen-7b-int8")
    assert attribution.accounts["decode"].kernel_j is not None


def test_energy_of_another_workload_is_doubted(tmp_path: Path) -> None:
    """143 ms and 4,500 launches a token given to 0.25 ms and three kernels, without a word."""
    assert "not of the weighed workload" in told(found(tmp_path, "25*/trace.json", energy=DATA / "h100-qwen-7b-int8"))


def test_the_only_device_of_a_file_is_that_of_its_kernels(tmp_path: Path) -> None:
    """ROCm numbers agents in events and devices from 0 (HTA amd_trace, TraceLens mi300)."""
    assert found(tmp_path, "31*/trace.json").run.facts.device.name == "AMD Instinct MI300X"


def test_what_outlasts_the_next_on_its_stream_is_cut(tmp_path: Path) -> None:
    """TraceLens#669: 7 of 55,423 events made 62 % of the time."""
    attribution = found(tmp_path, "32*/trace.json")
    assert figures(attribution, "decode")[1] == 1_050 * US
    assert "Cut: 1 GPU record" in told(attribution)


def test_branches_of_a_graph_are_not_cut() -> None:
    """They run side by side under the number of the stream that launched the graph."""
    kernels = pd.DataFrame(
        {"start_ns": [100, 110], "end_ns": [200, 120], "device": 0, "context": 1, "stream": 7, "correlation_id": 1}
    )
    launches = pd.DataFrame({"start_ns": [50], "end_ns": [60], "correlation_id": [1]})
    (cut, _, told_), (kept, _, nothing) = (sound(kernels.assign(graph_id=g), launches) for g in (0, 3))
    assert (cut["end_ns"].to_list(), len(told_)) == ([110, 120], 1)
    assert (kept["end_ns"].to_list(), nothing) == ([200, 120], [])


def test_processes_with_large_numbers_are_read(tmp_path: Path) -> None:
    """perfetto#935: tools that merge traces shift pids beyond 2^31."""
    assert figures(found(tmp_path, "34*/trace.json"), "decode")[0] == 3


def test_export_and_import_give_the_same_launches(tmp_path: Path) -> None:
    """Lianhang666/gpu4: 38 host calls became 15."""
    first = found(tmp_path, "27*/cap.sqlite")
    out = export_run(first.run.path, "nsys", tmp_path / "again.sqlite")
    again = attribute(import_capture(out, tmp_path / "again"))
    assert len(first.run.table("launches")) == len(again.run.table("launches"))
    assert [figures(a, "capture") for a in (first, again)] == [(3, *figures(first, "capture")[1:])] * 2


def _attacked(tmp_path: Path, statement: str) -> Path:
    path = tmp_path / "attack.sqlite"
    shutil.copy(NSYS, path)
    path.chmod(0o600)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(statement)
        connection.commit()
    return path


def test_hostile_files_end_in_a_sentence(tmp_path: Path) -> None:
    """Views that never end, values that are not there, names that are there twice, brackets without an end."""
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS start, i AS end FROM n"
    view = _attacked(
        tmp_path,
        f"DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL; CREATE VIEW CUPTI_ACTIVITY_KIND_KERNEL AS {endless};"
        "DROP TABLE IF EXISTS CUPTI_ACTIVITY_KIND_MEMCPY; DROP TABLE IF EXISTS CUPTI_ACTIVITY_KIND_MEMSET;",
    )
    deep, nothing = tmp_path / "deep.json", tmp_path / "nothing.json"
    deep.write_text('{"traceEvents": ' + "[" * 100_000)
    nothing.write_text(json.dumps([{"ph": "X", "cat": "kernel", "name": "k", "ts": 0, "dur": 0}]))
    for path in (view, deep, nothing):
        with pytest.raises(UsageError):
            import_capture(path, tmp_path / "run", force=True)
    large = _attacked(
        tmp_path, "UPDATE StringIds SET value = zeroblob(100000000) WHERE id = (SELECT min(id) FROM StringIds);"
    )
    with pytest.raises(UsageError):
        import_capture(large, tmp_path / "run", force=True)


def test_triggers_of_a_file_never_fire(tmp_path: Path) -> None:
    """A file is read as evidence: what it would do when somebody writes to it is never done."""
    fires = "BEGIN DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL; INSERT INTO fired VALUES (1); END;"
    path = _attacked(
        tmp_path,
        "CREATE TABLE fired (i INTEGER);"
        + "".join(
            f"CREATE TRIGGER t{number} {when} ON {table} {fires}"
            for number, (when, table) in enumerate(
                [("AFTER INSERT", "StringIds"), ("BEFORE UPDATE", "NVTX_EVENTS"), ("AFTER DELETE", "StringIds")]
            )
        ),
    )
    before = path.read_bytes()
    assert len(import_capture(path, tmp_path / "run").table("kernels")) == 101
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("attack.sqlite-*"))


def test_ranges_of_one_phase_inside_each_other_lose_no_kernel(tmp_path: Path) -> None:
    """A wrapper that annotates what it wraps: 20 kernels, of which 4 were counted."""
    inner = [event("user_annotation", "decode", 500 * n + 90, 300) for n in range(3)]
    outer = [event("user_annotation", "decode", 0, 2_200)]
    nested, flat = (
        attribute(import_capture(written(tmp_path / f"{name}.json", [*ranges, *work(20)]), tmp_path / name))
        for name, ranges in (("nested", [*outer, *inner]), ("flat", outer))
    )
    assert figures(nested, "decode") == figures(flat, "decode") == (20, 800 * US, 19 * 60 * US)


def test_records_of_no_length_are_told(tmp_path: Path) -> None:
    attribution = attribute(import_capture(written(tmp_path / "zero.json", [kernel("k", 5, 0, 1)]), tmp_path / "run"))
    assert not attribution.accounts
    assert "No phase has a GPU record of any length" in told(attribution)


def test_a_latency_below_zero_is_never_printed() -> None:
    """A valid short run whose decode, by difference, came out at -18.5 ms: "a decoded token takes -18.5 ms"."""
    attribution = attribute(RunFolder(DATA / "negative-latency-noise"))
    assert "decode" not in attribution.accounts
    assert "The latency of decode is not known: by difference it is -18.5 ms per token" in told(attribution)


def test_a_capture_without_phases_cannot_be_given_joules(tmp_path: Path) -> None:
    """TraceLens h100/Qwen1.5-0.5B with --energy: 1,707 kernels, "the timeline pass recorded no kernels"."""
    attribution = found(tmp_path, "26*/trace.json", energy=DATA / "h100-qwen-7b-int8")
    assert "no prefill or decode to give the joules to" in state(Explanation(attribution)).note


def test_what_unpacks_to_a_thousand_times_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b'{"traceEvents": [' + b" " * 2**27 + b"]}", 9))
    with pytest.raises(UsageError, match="100 times as long"):
        import_capture(path, tmp_path / "run")


def test_several_members_of_gzip_are_one_trace(tmp_path: Path) -> None:
    (source,) = CAPTURES.glob("01*/trace.json")
    whole = source.read_bytes()
    path = tmp_path / "two.json.gz"
    path.write_bytes(gzip.compress(whole[:500]) + gzip.compress(whole[500:]))
    assert len(import_capture(path, tmp_path / "run").table("kernels")) == 5


def test_names_with_markup_and_a_megabyte_are_bounded(tmp_path: Path) -> None:
    (source,) = CAPTURES.glob("01*/trace.json")
    trace = json.loads(source.read_text())
    names = ["<script>alert(1)</script>", "=HYPERLINK(1)", "a\x1b[31m\x00b", "x" * 2**20]
    kernels = [event for event in trace["traceEvents"] if event["cat"] == "kernel"]
    for one, name in zip(kernels, names, strict=False):
        one["name"] = name
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace))
    run = import_capture(path, tmp_path / "run")
    shown = llmkern("report", str(run.path))
    assert shown.returncode == 0
    assert not {"\x1b", "\x00"} & set(shown.stdout)
    assert max(map(len, shown.stdout.splitlines())) < 400
    page, csv = tmp_path / "page.html", tmp_path / "csv"
    for arguments in (("--html", str(page)), ("--csv", str(csv))):
        assert llmkern("report", str(run.path), *arguments).returncode == 0
    assert "<script>alert(1)" not in page.read_text()
    # A spreadsheet takes a cell that begins so for a formula.
    assert ",=HYPERLINK" not in (csv / "kernels.csv").read_text()


def test_kernels_of_nsys_without_times_are_left_out(tmp_path: Path) -> None:
    path = _attacked(
        tmp_path,
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 0, end = 0 WHERE rowid IN "
        "(SELECT rowid FROM CUPTI_ACTIVITY_KIND_KERNEL ORDER BY rowid LIMIT 2);",
    )
    run = import_capture(path, tmp_path / "run")
    assert len(run.table("kernels")) == 99
    assert "Left out: 2 GPU records without times" in told(attribute(run))


def test_a_name_that_is_there_twice_is_read_once(tmp_path: Path) -> None:
    path = _attacked(
        tmp_path,
        "CREATE TABLE s AS SELECT * FROM StringIds; DROP TABLE StringIds; ALTER TABLE s RENAME TO StringIds;"
        "INSERT INTO StringIds SELECT * FROM StringIds;",
    )
    assert len(import_capture(path, tmp_path / "run").table("kernels")) == 101
