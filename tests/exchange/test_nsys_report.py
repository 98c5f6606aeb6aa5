"""The native report through a stand-in for Nsight Systems' writer: what is called, with and without a capture."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import nvtx.writer
import pytest

from llmkern.errors import RecordingError, UsageError
from llmkern.exchange import importing
from llmkern.exchange.exporting import export_run
from llmkern.exchange.importing import import_capture
from llmkern.exchange.overlay import Overlay, cut, overlay
from llmkern.exchange.to_nsys_report import write_report
from tests.recorded import DATA, recorded, recorded_run
from tests.test_cli import assert_sentence, llmkern


@dataclass
class Stream:
    name: str
    domain: Domain
    written: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    is_open: bool = False

    def __enter__(self) -> Stream:
        self.is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False

    def _note(self, name: str, *args: Any, **kwargs: Any) -> None:
        assert self.is_open
        self.written.append((name, args, kwargs))

    def write_startend(self, start: int, end: int, *, message: Any, category: str, color: int | None = None) -> None:
        assert start <= end
        self._note("startend", start, end, message=message, category=category, color=color)

    def write_pushpop(self, start: int, end: int, *, message: str, category: str) -> None:
        assert start <= end
        self._note("pushpop", start, end, message=message, category=category)

    def write_counter_batch(self, counter: Any, data: Any, *, timestamps: Any) -> None:
        assert len(data) == len(timestamps)
        self._note("counters", counter, data, timestamps=timestamps)


@dataclass
class Domain:
    name: str
    strings: list[str] = field(default_factory=list)

    def get_registered_string(self, text: str) -> tuple[str, int]:
        self.strings.append(text)
        return text, len(self.strings)

    def get_counter(self, name: str, kind: type) -> tuple[str, type]:
        return name, kind


@dataclass
class Session:
    name: str
    options: dict[str, str]
    streams: list[Stream] = field(default_factory=list)
    ended: bool = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True

    def get_domain(self, name: str) -> Domain:
        return Domain(name)

    def create_stream(self, name: str, *, domain: Domain) -> Stream:
        self.streams.append(Stream(name, domain))
        return self.streams[-1]


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    made: list[Session] = []

    def begin(*, name: str, **options: str) -> Session:
        made.append(Session(name, options))
        return made[-1]

    module = ModuleType("nsys_writer")
    vars(module)["Session"] = begin
    monkeypatch.setitem(sys.modules, "nsys_writer", module)
    return made


@pytest.fixture(scope="module")
def step() -> Overlay:
    return cut(overlay(recorded("int8"), ("calls",)), "decode", (1, 1))


@pytest.mark.parametrize("kind", ["Session", "Domain", "Stream"])
def test_the_stand_in_has_no_method_that_the_writer_lacks(kind: str) -> None:
    ours = {
        name for name in vars(globals()[kind]) if not name.startswith("_") and callable(vars(globals()[kind])[name])
    }
    assert ours <= set(dir(getattr(nvtx.writer, kind)))


def test_a_new_report_holds_everything(step: Overlay, sessions: list[Session], tmp_path: Path) -> None:
    path = write_report(step, tmp_path / "step.nsys-rep")
    (session,) = sessions
    assert (session.name, session.options, session.ended) == (str(path), {"time_base": "UTC"}, True)
    streams = {stream.name: stream for stream in session.streams}
    assert all(stream.domain.name == "llmkern" for stream in session.streams)
    gaps = streams["idle gaps"].written
    assert len(gaps) == len(step.gaps)
    first = step.gaps.sort_values("start_ns").iloc[0]
    name, times, told = gaps[0]
    assert (name, times, told["category"]) == ("startend", (first["start_ns"], first["end_ns"]), "gap")
    assert told["message"].startswith(f"{first['cause']}, ")
    assert "J, " in told["message"]
    (kernels,) = (stream for name, stream in streams.items() if name.startswith("kernels of stream"))
    assert len(kernels.written) == len(step.kernels)
    # A name is registered once, not written a thousand times.
    assert len(kernels.domain.strings) == step.kernels["name"].nunique()
    marks = [told["message"] for _, _, told in streams["phases and token steps"].written]
    assert any(text.startswith("token 1, ") and text.endswith("J") for text in marks)
    counters = [args[0][0] for stream in session.streams for name, args, _ in stream.written if name == "counters"]
    assert "power, driver's samples [W]" in counters
    assert any(name.startswith("energy of decode") for name in counters)


def test_merged_into_a_capture_it_leaves_the_kernels_to_it(
    step: Overlay, sessions: list[Session], tmp_path: Path
) -> None:
    capture = tmp_path / "capture.nsys-rep"
    capture.write_bytes(b"report")
    write_report(step, tmp_path / "merged.nsys-rep", capture)
    (session,) = sessions
    assert session.options == {"time_base": "UTC", "report_merge": str(capture)}
    names = [stream.name for stream in session.streams]
    assert names[:2] == ["idle gaps", "phases and token steps"]
    assert not any(name.startswith("kernels") for name in names)


def test_the_capture_is_never_written_over(step: Overlay, sessions: list[Session], tmp_path: Path) -> None:
    capture = tmp_path / "capture.nsys-rep"
    capture.write_bytes(b"report")
    with pytest.raises(UsageError, match="is the capture itself"):
        write_report(step, capture, capture)
    with pytest.raises(UsageError, match="does not exist"):
        write_report(step, capture, tmp_path / "none.nsys-rep")
    assert not sessions


def test_what_the_writer_says_is_a_sentence(step: Overlay, sessions: list[Session], tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> Session:
        raise nvtx.writer.WriterError(3)

    vars(sys.modules["nsys_writer"])["Session"] = fail
    with pytest.raises(RecordingError, match=r"writer failed on .*step.nsys-rep .*check its version"):
        write_report(step, tmp_path / "step.nsys-rep")


def test_without_nsight_systems_it_says_what_to_do(tmp_path: Path) -> None:
    run = str(recorded_run("int4").path)
    done = llmkern("export", run, "--to", "nsys", "--out", str(tmp_path / "r.nsys-rep"))
    assert_sentence(done, "needs the module nsys_writer of Nsight Systems", ".sqlite")


def test_only_nsys_merges(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use it with --to nsys, not perfetto"):
        export_run(recorded_run("int4").path, "perfetto", tmp_path / "x", merge=tmp_path / "capture.nsys-rep")


@pytest.mark.parametrize("ends", [0, 3], ids=["exported", "fails"])
def test_nsys_itself_exports_a_native_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: int) -> None:
    tool = tmp_path / "bin" / "nsys"
    tool.parent.mkdir()
    # Like the real one it writes where --output says, the report being its last word.
    tool.write_text(
        "#!/bin/sh\n"
        f'if [ {ends} -ne 0 ]; then echo "version 2026.1 is too new" >&2; exit {ends}; fi\n'
        'while [ "$1" != "--output" ]; do shift; done\n'
        'cp "$3" "$2"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    report = tmp_path / "capture.nsys-rep"
    report.write_bytes((DATA / "nsys-export-2025.3.sqlite").read_bytes())
    if ends:
        with pytest.raises(UsageError, match="is too new"):
            importing._of_report(report)
        return
    capture = importing._of_report(report)
    assert (capture.imported.file, len(capture.kernels)) == ("capture.nsys-rep", 101)


def test_a_native_report_without_nsys_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    report = tmp_path / "capture.nsys-rep"
    report.write_bytes(b"\x0a\x0bNSYS")
    with pytest.raises(UsageError, match="only nsys can read, and it is not installed here"):
        import_capture(report, tmp_path / "run")
