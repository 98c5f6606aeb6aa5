"""Pass *replay*: each distinct operator of the run alone, with its real arguments, for its joules per launch.

A sensor that ticks every 100 ms cannot see a kernel of 2 us, but it can see two seconds of nothing else. The weights of
all layers take turns, so that they come from memory and not from a warm cache; activations are those of the first call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from llmkern.record.device.interface import Device
from llmkern.record.graphs import is_graph
from llmkern.record.passes.apart import taken_apart
from llmkern.record.passes.inspection import NEW_TOKENS
from llmkern.record.passes.kept import Case, Keeper
from llmkern.record.passes.weigh import idle
from llmkern.record.rig import Rig, Step
from llmkern.runfolder.facts import ReplayFacts
from llmkern.runfolder.replays import Wanted
from llmkern.workload.engine import taken_apart as in_parts

WINDOW_S = 1.0
# A kernel alone is small, runs back to back, and is needed to a tenth.
ALONE_S = 0.5
# The activations of a layer decide how many bits switch; those of as many layers are kept as fit in this share of the
# free memory, and of the others the first's.
KEPT_SHARE = 0.1
# As finely mixed with rest as in a run, where kernels and gaps take turns within a millisecond.
_BURST_S = 0.001


@dataclass(frozen=True)
class Replayed:
    """One window: *launches* operators of *signature*, or of its *kernel* alone, between its start and end."""

    signature: str
    kernel: str | None
    start_ns: int
    end_ns: int
    launches: int
    duty: float
    captured: bool


def replay(rig: Rig, wanted: list[Wanted]) -> None:
    """Replay the operators *wanted* into table ``replays``, and rest once more when all is warm.

    An operator that changes what it is given is left out; the facts say how many there were.
    """
    if not wanted:
        return
    plans = {one.signature: one for one in wanted}
    cases, drifting = kept_cases(rig, list(plans))
    total = sum(len(plans[case.signature].duties) + len(plans[case.signature].alone) for case in cases)
    with rig.pumped("replay") as pump, rig.stages.stage("Replaying", total) as advance:
        for window in windows(rig, [(case, plans[case.signature]) for case in cases], advance):
            pump.check()
            row = {name: [value] for name, value in asdict(window).items()}
            rig.writer.append(
                "replays", {**row, "seconds": None, "dynamic_j": None, "floor_w": None, "clock_mhz": None}
            )
        # Warmer than before: this is where the floor's slope over temperature comes from.
        idle(rig)
    known = rig.writer.facts.replays or ReplayFacts()
    rig.writer.note(replays=replace(known, replayed=len(cases), drifting=drifting))


def kept_cases(rig: Rig, wanted: list[str]) -> tuple[list[Case], int]:
    """Return the cases of *wanted* that one more generation calls, and how many of them drift and are left out."""
    free_bytes, _ = rig.device.free_bytes()
    keeper = Keeper(rig.model, set(wanted), KEPT_SHARE * free_bytes)
    with in_parts(rig.model), keeper.keeping():
        rig.generation(NEW_TOKENS)
    rig.annotator.drain()
    cases = [keeper.cases[name] for name in wanted if name in keeper.cases]
    with torch.inference_mode():
        steady = [case for case in cases if not case.drifts()]
    return steady, len(cases) - len(steady)


def windows(rig: Rig, cases: list[tuple[Case, Wanted]], advance: Step) -> Iterator[Replayed]:
    """Run each of *cases* as it is wanted and yield its windows, each begun at a counter tick and followed by two."""
    for case, wanted in cases:
        with torch.inference_mode(), burst_of(rig.device, case) as burst:
            for duty in wanted.duties:
                start_ns, end_ns, bursts = _window(rig, case.signature, burst.run, WINDOW_S, duty)
                launches = bursts * burst.launches
                yield Replayed(case.signature, None, start_ns, end_ns, launches, duty, burst.graph is not None)
                advance()
            apart = taken_apart(rig.device, case, wanted) if wanted.alone and not is_graph(case.signature) else ()
            for kernel, alone, count in apart:
                start_ns, end_ns, bursts = _window(rig, kernel, alone.replay, ALONE_S, 1.0)
                alone.reset()
                yield Replayed(case.signature, kernel, start_ns, end_ns, bursts * count, 1.0, True)
                advance()


def _window(rig: Rig, name: str, burst: Callable[[], None], seconds: float, duty: float) -> tuple[int, int, int]:
    """Run *burst* for *seconds*, the share *duty* of the time, and return the window's start and end and how often."""
    rig.wait_for_ticks(1)
    # Clock and throttle reasons several times in a window; reading them delays no joule.
    rig.pace(0.0)
    bursts = 0
    with rig.annotator.range(name[:80], "replay"):
        start_ns, start_s = time.time_ns(), time.monotonic()
        while time.monotonic() - start_s < seconds:
            begin_s = time.perf_counter()
            burst()
            rig.device.synchronize()
            bursts += 1
            if duty < 1:
                time.sleep((time.perf_counter() - begin_s) * (1 / duty - 1))
        end_ns = time.time_ns()
    rig.wait_for_ticks(2)
    return start_ns, end_ns, bursts


@dataclass(frozen=True)
class Burst:
    """About 1 ms of an operator: *run* launches it *launches* times, as a *graph* unless it cannot be captured."""

    run: Callable[[], None]
    launches: int
    graph: Any = None


@contextmanager
def burst_of(device: Device, case: Case) -> Iterator[Burst]:
    """Yield a burst of *case*.

    Operators that synchronize cannot be captured and are launched one by one; then the host's time is idle time, which
    the floor pays for.
    """
    for index in range(len(case.calls)):
        case.run(index)
    device.synchronize()
    begin_s = time.perf_counter()
    case.run(0)
    device.synchronize()
    count = max(1, min(2000, round(_BURST_S / max(time.perf_counter() - begin_s, 1e-6))))
    # Every call as often as the others, so that a burst moves each layer's weights.
    count = -(-count // len(case.calls)) * len(case.calls)

    def eager() -> None:
        for index in range(count):
            case.run(index)

    # A graph cannot be captured in another.
    graph = None if is_graph(case.signature) else device.captured(eager)
    if graph is None:
        yield Burst(eager, count)
    else:
        yield Burst(graph.replay, count, graph)
        graph.reset()
