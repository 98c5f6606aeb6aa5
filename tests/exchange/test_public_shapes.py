"""Shapes of captures that others met in public: each test names where, and makes a small input of the same form."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from llmkern.attribute.attribution import Attribution, attribute
from llmkern.errors import UsageError
from llmkern.exchange.exporting import export_run
from llmkern.exchange.importing import import_capture
from tests.traces import event, kernel, launch, work, written

US = 1_000


def read(tmp_path: Path, path: Path) -> Attribution:
    return attribute(import_capture(path, tmp_path / "run"))


def launches(attribution: Attribution) -> dict[str, int]:
    phases = attribution.timeline.phases
    return {str(phase): int(count) for phase, count in phases.groupby("phase", observed=True)["kernels"].sum().items()}


@pytest.mark.parametrize("word", ["inf", "-inf", "nan", "NaN", "Infinity"])
def test_a_bandwidth_that_is_no_number(tmp_path: Path, word: str) -> None:
    """pytorch/kineto#105: a copy of no length has a bandwidth of inf, which is no JSON."""
    copy = kernel("Memcpy HtoD (Pageable -> Device)", 50, 0, 9, category="gpu_memcpy", bytes=200, bandwidth="WORD")
    named = event("user_annotation", "is it, inf ,or [nan]", 0, 1)
    path = written(tmp_path / "trace.json", [copy, named, *work(3)])
    path.write_text(path.read_text().replace('"WORD"', word))
    attribution = read(tmp_path, path)
    assert launches(attribution) == {"capture": 4}
    assert "is it, inf ,or [nan]" in set(attribution.run.table("ranges")["name"])


def test_copies_and_fills_that_rocm_calls_kernels(tmp_path: Path) -> None:
    """AMD-AGI/TraceLens#613: ROCm 7.1 writes them as kernels of rocclr, 7.2 as copies and sets of memory."""
    events = [
        kernel("__amd_rocclr_copyBuffer", 0, 10, 1),
        kernel("__amd_rocclr_fillBufferAligned", 20, 10, 2),
        kernel("CopyHostToDevice", 40, 10, 3, category="gpu_memcpy"),
        kernel("Cijk_Ailk_Bljk_HHS_BH_MT128x128x32", 60, 10, 4),
    ]
    attribution = read(tmp_path, written(tmp_path / "trace.json", events))
    rows = attribution.run.table("kernels")
    assert rows["kind"].tolist() == ["memcpy", "memset", "memcpy", "kernel"]
    assert rows["name"].tolist()[2] == "memcpy HtoD (unknown)"
    kinds = attribution.kernels_of("capture").groupby("kind", observed=True)["launches"].sum()
    assert {str(kind): count for kind, count in kinds.items() if count} == {"copy": 2, "memset": 1, "gemm": 1}


def test_many_kernels_of_one_launch_of_a_hip_graph(tmp_path: Path) -> None:
    """AMD-AGI/TraceLens#827: 41,960 kernels of 40 hipGraphLaunch calls, told by nothing but their correlation."""
    events = [event("user_annotation", "decode", 0, 1_000)]
    for step in range(4):
        events.append(launch(step * 200 + 1, step + 1, name="hipGraphLaunch"))
        events += [kernel(f"k{n}", step * 200 + 10 + n * 5, 4, step + 1) for n in range(30)]
    attribution = read(tmp_path, written(tmp_path / "trace.json", events))
    assert launches(attribution) == {"decode": 120}
    timeline = attribution.timeline
    assert timeline.kernels["call"].nunique() == 4
    assert int(timeline.phases["gap_ns"].sum()) == (4 * 29 * 1 + 3 * 51) * US


def test_times_in_quotes(tmp_path: Path) -> None:
    """Ascend/pytorch#133: ts is a string of absolute microseconds, which a float would round."""
    events = work(3)
    for one in events:
        one["ts"], one["dur"] = f"{1_780_000_000_000_000 + one['ts']:.3f}", str(one["dur"])
    attribution = read(tmp_path, written(tmp_path / "trace.json", events, baseTimeNanoseconds=0))
    assert int(attribution.timeline.phases["gap_ns"].sum()) == 120 * US


def test_an_empty_event_ends_the_list(tmp_path: Path) -> None:
    """google/perfetto#6251: JAX, and merging scripts, close the list with {} so that every event has a comma."""
    assert launches(read(tmp_path, written(tmp_path / "trace.json", [*work(3), {}]))) == {"capture": 3}


def test_a_trace_of_jax_is_called_so(tmp_path: Path) -> None:
    """google/perfetto#6251, jax-ml/jax#30290: events of XLA have no category, devices are processes."""
    events = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "X", "pid": 1, "tid": 1, "ts": 1, "dur": 5, "name": "loop_fusion"},
    ]
    with pytest.raises(UsageError, match="trace of JAX's profiler"):
        import_capture(written(tmp_path / "trace.json", events), tmp_path / "run")


def test_waits_on_the_device_s_rows_are_no_work(tmp_path: Path) -> None:
    """pytorch/kineto#1356, #866, HTA#121: waits stand among kernels, on stream -1 or a row of their own."""
    events = [
        *work(3),
        event("cuda_sync", "Stream Sync", 100, 300, pid=0, tid=1_000_007, stream=7, correlation=90),
        event("cuda_sync", "Context Sync", 100, 300, pid=0, tid=-1, stream=-1, correlation=91),
        event("cuda_sync", "Event Sync", 100, 300, pid=0, tid=4_294_967_295, stream=4_294_967_295, correlation=92),
    ]
    attribution = read(tmp_path, written(tmp_path / "trace.json", events))
    assert launches(attribution) == {"capture": 3}
    assert int(attribution.timeline.phases["busy_ns"].sum()) == 120 * US


def test_what_the_recorder_took_is_the_recorder_s(tmp_path: Path) -> None:
    """pytorch/kineto#541, #1020: a launch that waits for a new buffer takes orders of magnitude longer."""
    slow = [launch(390, 4), kernel("gemm", 1_400, 40, 4)]
    slow[0]["dur"] = 1_000
    events = [*work(3), *slow, event("overhead", "Buffer Flush", 391, 995, pid=-1, tid=0)]
    attribution = read(tmp_path, written(tmp_path / "trace.json", events))
    gaps = attribution.gaps.groupby("cause", observed=True)["duration_ns"].sum()
    assert gaps["profiler"] == 1_060 * US


def test_calls_of_other_devices_runtimes(tmp_path: Path) -> None:
    """pytorch/kineto#1441: Intel GPUs have xpu_runtime, out-of-tree devices privateuse1_runtime and _driver."""
    events = [
        *(launch(100 * n - 10, n, name="urEnqueueKernelLaunch", category=category)
          for n, category in enumerate(("xpu_runtime", "privateuse1_driver", "mtia_runtime"), 1)),
        *(kernel("gemm_kernel", 100 * n, 40, n) for n in (1, 2, 3)),
    ]  # fmt: skip
    attribution = read(tmp_path, written(tmp_path / "trace.json", events))
    kernels = attribution.timeline.kernels
    assert (kernels["start_ns"] - kernels["issued_ns"] == 10 * US).all()


def test_steps_of_vllm_are_phases(tmp_path: Path) -> None:
    """vllm-project/vllm#22496: a worker's step says how many requests were in prefill and in decode."""
    steps = {
        "execute_context_1(512)_generation_0(0)": 2,
        "execute_context_0(0)_generation_8(8)": 3,
        "execute_context_0(0)_generation_9(9)": 3,
        "execute_context_1(64)_generation_7(7)": 4,
    }
    events, ts, correlation = [], 0.0, 0
    for name, count in steps.items():
        events.append(event("user_annotation", name, ts, 100.0 * count))
        for _ in range(count):
            correlation += 1
            events += [launch(ts + 10, correlation), kernel("gemm", ts + 20, 40, correlation)]
            ts += 100.0
    attribution = read(tmp_path, written(tmp_path / "trace.json", events))
    assert launches(attribution) == {"prefill": 2, "decode": 6, "mixed": 4}
    assert attribution.timeline.units("decode") == 2


def exported(tmp_path: Path) -> Path:
    run = import_capture(
        written(tmp_path / "one.json", [event("user_annotation", "decode", 0, 500), *work(4)]), tmp_path / "a"
    )
    return export_run(run.path, "nsys", tmp_path / "one.sqlite")


def test_the_latest_of_several_versions_of_a_table(tmp_path: Path) -> None:
    """GindaChen/nsys-ai#304: V10 comes after V3, and MEMCPY2 is no version of MEMCPY."""
    path = exported(tmp_path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL RENAME TO CUPTI_ACTIVITY_KIND_KERNEL_V10")
        connection.execute(
            "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL_V3 AS SELECT * FROM CUPTI_ACTIVITY_KIND_KERNEL_V10 LIMIT 1"
        )
        connection.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY2 AS SELECT * FROM CUPTI_ACTIVITY_KIND_KERNEL_V10")
        connection.commit()
    assert launches(read(tmp_path, path)) == {"decode": 4}


def test_ranges_without_a_table_of_their_texts(tmp_path: Path) -> None:
    """GindaChen/nsys-ai#101: some schemas have no textId, only the text; #291: some captures have no ranges."""
    path = exported(tmp_path)
    with closing(sqlite3.connect(path)) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(NVTX_EVENTS)")]
        text = "COALESCE(n.text, (SELECT value FROM StringIds s WHERE s.id = n.textId)) AS text"
        kept = ", ".join(f'n."{c}"' for c in columns if c not in ("text", "textId"))
        connection.execute(f"CREATE TABLE other AS SELECT {kept}, {text} FROM NVTX_EVENTS n")
        connection.execute("DROP TABLE NVTX_EVENTS")
        connection.execute("ALTER TABLE other RENAME TO NVTX_EVENTS_V2")
        connection.commit()
    assert launches(read(tmp_path, path)) == {"decode": 4}
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE NVTX_EVENTS_V2")
        connection.commit()
    attribution = attribute(import_capture(path, tmp_path / "none"))
    assert launches(attribution) == {"capture": 4}


@pytest.mark.parametrize(
    "torn",
    [lambda whole: whole[:-40], lambda whole: whole[:-2] + ",]}", lambda whole: whole + " x"],
    ids=["cut", "comma", "behind"],
)
def test_text_that_is_nearly_json_is_refused_with_its_place(tmp_path: Path, torn: Callable[[str], str]) -> None:
    """google/perfetto#393, pytorch/pytorch#130622: a trace torn at its end, or with a comma or junk behind it."""
    path = written(tmp_path / "trace.json", work(2))
    path.write_text(torn(path.read_text()))
    with pytest.raises(UsageError, match="no JSON at character"):
        import_capture(path, tmp_path / "run")
