"""RAPL through a powercap folder of our own, and a whole CPU run that is weighed with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkern import session
from llmkern.attribute.attribution import attribute
from llmkern.progress import Stages
from llmkern.record import replay_cache
from llmkern.record.device import cpu
from llmkern.record.device.rapl import RaplMeter, package_zones
from llmkern.record.options import TraceOptions
from llmkern.record.passes import replay
from llmkern.runfolder import RunFolder

WRAP_UJ = 262_143_328_850


def zone(root: Path, folder: str, name: str, value_uj: int = 0) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{value_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{WRAP_UJ}\n")
    return path


def test_packages_count_once_and_their_parts_not_at_all(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0")
    zone(tmp_path, "intel-rapl:0:0", "core")
    zone(tmp_path, "intel-rapl:1", "package-1")
    zone(tmp_path, "intel-rapl:2", "psys")
    zones, problem = package_zones(tmp_path)
    assert [z.package for z in zones] == [0, 1]
    assert problem is None


def test_none_and_no_permission_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no RAPL package zone" in str(package_zones(tmp_path)[1])
    counter = zone(tmp_path, "intel-rapl:0", "package-0") / "energy_uj"
    read = Path.read_text

    def denied(path: Path, *arguments: object, **options: object) -> str:
        if path == counter:
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_text", denied)
    zones, problem = package_zones(tmp_path)
    assert zones == []
    assert f"sudo chmod a+r {counter}" in str(problem)


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", WRAP_UJ - 1_000_000)
    meter = RaplMeter(package_zones(tmp_path)[0])
    meter.read()
    (path / "energy_uj").write_text("2000000\n")
    meter.read()
    first, second = meter.drain()["energy"]["energy_mj"]
    assert second - first == 3000
    assert meter.busy_s() > 0


def test_a_wait_ends_with_the_next_reading_or_the_timeout(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0")
    meter = RaplMeter(package_zones(tmp_path)[0], period_s=0.02)
    assert meter.wait_for_tick(0.01) is None
    meter.start()
    tick = meter.wait_for_tick(1.0)
    meter.stop()
    assert tick is not None
    assert abs(time.time_ns() - tick) < 1e9


@contextmanager
def package(root: Path, joule: Callable[[], float]) -> Iterator[Path]:
    """A package whose counter shows what *joule* says."""
    counter = zone(root, "intel-rapl:0", "package-0") / "energy_uj"
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.005):
            temporary = counter.with_suffix(".new")
            temporary.write_text(f"{int(joule() * 1e6)}\n")
            temporary.replace(counter)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield root
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def fifty_watts(tmp_path: Path) -> Iterator[Path]:
    """A package that draws 50 W, whatever it does."""
    begin_s = time.monotonic()
    with package(tmp_path / "powercap", lambda: (time.monotonic() - begin_s) * 50) as root:
        yield root


@pytest.fixture
def busy_package(tmp_path: Path) -> Iterator[Path]:
    """A package that draws 50 W at rest and 100 W more for each second of CPU time that this process uses."""
    begin_s, cpu_s = time.monotonic(), time.process_time()
    with package(
        tmp_path / "powercap", lambda: (time.monotonic() - begin_s) * 50 + (time.process_time() - cpu_s) * 100
    ) as root:
        yield root


def test_a_run_on_the_cpu_is_weighed_with_rapl(
    tmp_path: Path, fifty_watts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "package_zones", lambda: package_zones(fifty_watts))
    options = TraceOptions(
        "qwen-tiny", device="cpu", prompt_tokens=16, new_tokens=12, warmup=1, repeats=2, out=tmp_path / "run"
    )
    found = attribute(RunFolder(session.trace(options, Stages(quiet=True))))
    assert found.weighed is not None
    assert found.weighed.floor is not None
    assert found.weighed.floor.at(None).value == pytest.approx(50, rel=0.05)
    for account in found.accounts.values():
        assert account.mean_w == pytest.approx(50, rel=0.1)
        assert account.gap_j is not None
        assert account.gap_j.value == pytest.approx(50 * account.gap_s.value, rel=0.1)
    assert found.weighed.counter_j is not None
    assert abs(found.weighed.residual_j or 0.0) < 0.02 * found.weighed.counter_j


def test_operators_get_their_marginal_joules_by_replay(
    tmp_path: Path, busy_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # GIVEN a device that draws 100 J per second of CPU time above its floor, on one thread
    monkeypatch.setattr(cpu, "package_zones", lambda: package_zones(busy_package))
    monkeypatch.setattr(replay, "WINDOW_S", 0.6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = TraceOptions(
            "qwen-tiny",
            device="cpu",
            prompt_tokens=64,
            new_tokens=12,
            warmup=1,
            repeats=2,
            out=tmp_path / "run",
        )
        run = RunFolder(session.trace(options, Stages(quiet=True)))
    finally:
        torch.set_num_threads(threads)
    attribution = attribute(run)
    found = attribution.marginals
    assert found is not None
    # THEN an operator that was replayed costs its own CPU time times 100 W above the floor; on a machine that others
    # use as well it gets less of the CPU than of the clock
    replays = run.table("replays")
    assert len(replays) >= 2 * 6
    for name, windows in replays.groupby(replays["signature"].astype(str)):
        seconds = (windows["end_ns"] - windows["start_ns"]).mul(windows["duty"]).sum() / 1e9 / windows["launches"].sum()
        if "linear" in name:
            (of,) = (n for n in found.unknowns.names if n.endswith(f" in {name}"))
            assert 0.2 < found.per_launch(of, regime=100.0).value / (100 * seconds) < 1.6, name
    prefill = attribution.accounts["prefill"]
    rows = attribution.frame[attribution.frame["phase"] == "prefill"]
    assert prefill.joules is not None
    assert prefill.joules.method == "marginal joules"
    assert rows["energy_j"].sum() == pytest.approx(prefill.weight.energy_j.value)  # type: ignore[union-attr]
    # AND the next run on this board takes them from the cache, where they are the same joules
    key = replay_cache.cache_key(run.facts.device, run.facts.versions, run.facts.model)
    cached = replay_cache.load(key)
    assert set(cached["signature"]) == set(replays["signature"].astype(str))
    assert replay_cache.load("another board").empty
    for name, windows in cached.groupby("signature"):
        per_launch = windows["dynamic_j"].sum() / windows["launches"].sum()
        if "linear" in name:
            (of,) = (n for n in found.unknowns.names if n.endswith(f" in {name}"))
            assert per_launch == pytest.approx(found.per_launch(of, regime=100.0).value, rel=0.3)


def _zone(root: Path, folder: str, label: str, energy_uj: int) -> Path:
    (root / folder).mkdir(parents=True)
    for name, value in (("name", label), ("energy_uj", energy_uj), ("max_energy_range_uj", 262143328850)):
        (root / folder / name).write_text(f"{value}\n")
    return root / folder / "energy_uj"


def test_some_packages_are_not_taken_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """codecarbon, zeus#268: after the advice for the first socket its energy passed for that of both."""
    readable, denied = _zone(tmp_path, "intel-rapl:0", "package-0", 1), _zone(tmp_path, "intel-rapl:1", "package-1", 2)
    real = Path.read_text

    def read(path: Path, *arguments: Any, **options: Any) -> str:
        if path == denied:
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read)
    zones, said = package_zones(tmp_path)
    assert zones == []
    assert said is not None
    assert "1 of 2 CPU packages" in said
    assert str(denied) in said
    assert str(readable) not in said


def test_dies_that_show_one_counter_are_counted_once(tmp_path: Path) -> None:
    for die, energy_uj in enumerate((1_000_000, 1_000_000, 7)):
        _zone(tmp_path, f"intel-rapl:{die}", f"package-0-die-{die}", energy_uj)
    zones, said = package_zones(tmp_path)
    assert (len(zones), said) == (2, None)
