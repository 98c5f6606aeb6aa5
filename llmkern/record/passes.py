"""The passes over one loaded workload, in their order: warm up, rest, weigh, rest, time, inspect, replay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from torch import nn

from llmkern.attribute.attribution import attribute
from llmkern.attribute.calibration import calibrate
from llmkern.attribute.replayed import worth_replaying
from llmkern.progress import Stages
from llmkern.record import environment, replay_cache
from llmkern.record.annotate import Annotator
from llmkern.record.device import Device, EnergyMeter
from llmkern.record.engine import taken_apart
from llmkern.record.generation import Generation
from llmkern.record.inspection import NEW_TOKENS, inspect
from llmkern.record.live import annotate_generations
from llmkern.record.options import TraceOptions
from llmkern.record.pump import Pump
from llmkern.record.replay import DUTIES, Keeper, replay
from llmkern.record.selftest import CYCLES, drive_sensors
from llmkern.record.timing import ranges, record_timeline
from llmkern.record.weigh import SHORTEST_WINDOW_S, OwnCost, WeighPlan, idle, plan_windows, warm_up, weigh
from llmkern.run import RunFolder, RunWriter


def record_passes(
    device: Device,
    generation: Generation,
    model: nn.Module,
    annotator: Annotator,
    writer: RunWriter,
    stages: Stages,
    options: TraceOptions,
) -> None:
    """Record every pass that *options* ask for into *writer*; raises LlmkernError where one cannot go on."""
    meters = device.meters()
    took_s: dict[str, float] = {}
    with ExitStack() as stack:
        for meter in meters:
            meter.start()
            stack.callback(meter.stop)
        if meters and device.kind == "cuda":
            with _timed("selftest", took_s), stages.stage("Testing the sensors", CYCLES) as advance:
                _test_sensors(device, annotator, meters, writer, advance)
        with _timed("warmup", took_s), stages.stage("Warming up", options.warmup) as advance:
            prefill_s, generate_s = warm_up(generation, options.warmup, options.new_tokens, advance)
        annotator.drain()
        # Without a sensor there is no tick to be long against.
        shortest_s = SHORTEST_WINDOW_S if meters else 0.0
        plan = plan_windows(options.repeats, options.new_tokens, prefill_s, generate_s, shortest_s)
        with _timed("weigh", took_s):
            cost = _weigh(generation, annotator, meters, writer, stages, plan)
        writer.write_facts(plan=asdict(plan), own_cost=cost)
        if options.annotate_only:
            with _timed("time", took_s), stages.stage("Annotating", options.trace_repeats) as advance:
                annotate_generations(
                    device,
                    generation,
                    model,
                    annotator,
                    meters,
                    writer,
                    new_tokens=options.new_tokens,
                    repeats=options.trace_repeats,
                    advance=advance,
                )
            writer.write_facts(sensors={meter.name: meter.facts() for meter in meters}, pass_s=took_s)
            return
        # On the CPU an operator is its own host call.
        passes = {"calls": 1} if device.kind == "cuda" else {}
        passes["time"] = options.trace_repeats
        facts = []
        with _timed("time", took_s), stages.stage("Timing", sum(passes.values())) as advance:
            for name, repeats in passes.items():
                facts.append(
                    record_timeline(
                        device,
                        generation,
                        annotator,
                        meters,
                        writer,
                        pass_name=name,
                        new_tokens=options.new_tokens,
                        repeats=repeats,
                        advance=advance,
                        layers=name == next(iter(passes)),
                    )
                )
        writer.write_facts(recorder=_together(facts), sensors={meter.name: meter.facts() for meter in meters})
        with _timed("inspect", took_s), stages.stage("Inspecting"):
            writer.write_facts(inspected=inspect(device, generation, model, annotator, writer))
        if meters and not options.quick:
            key = None if options.no_cache else replay_cache.cache_key(writer.facts["device"], environment.versions())
            with _timed("replay", took_s):
                _replay(device, generation, model, annotator, meters, writer, stages, key)
    writer.write_facts(pass_s=took_s)


@contextmanager
def _timed(name: str, into: dict[str, float]) -> Iterator[None]:
    begin_s = time.monotonic()
    yield
    into[name] = time.monotonic() - begin_s


def _test_sensors(
    device: Device,
    annotator: Annotator,
    meters: list[EnergyMeter],
    writer: RunWriter,
    advance: Callable[[], None],
) -> None:
    drains: list[Callable[[], Any]] = [meter.drain for meter in meters]
    with Pump(writer, [lambda: ranges(annotator, "selftest"), *drains]):
        drive_sensors(device, annotator, meters, advance)
    writer.write_facts(calibration={s.name: asdict(s) for s in calibrate(RunFolder(writer.path)).values()})


def _together(recordings: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what recorders said of several passes: counts added, the rest of the last."""
    last = recordings[-1]
    counts = {k for k, v in last.items() if isinstance(v, int) and k not in ("library_version", "clock_offset_ns")}
    return last | {k: sum(int(one.get(k, 0)) for one in recordings) for k in counts}


def _weigh(
    generation: Generation,
    annotator: Annotator,
    meters: list[EnergyMeter],
    writer: RunWriter,
    stages: Stages,
    plan: WeighPlan,
) -> dict[str, float]:
    drains: list[Callable[[], Any]] = [meter.drain for meter in meters]
    with Pump(writer, [lambda: ranges(annotator, "weigh"), *drains]) as pump:
        idle(annotator, meters)
        cost = OwnCost(pump, meters)
        with stages.stage("Weighing", plan.generations) as advance:

            def step() -> None:
                pump.check()
                advance()

            weigh(generation, annotator, meters, plan, step, cost)
        idle(annotator, meters)
    return cost.facts()


def _replay(
    device: Device,
    generation: Generation,
    model: nn.Module,
    annotator: Annotator,
    meters: list[EnergyMeter],
    writer: RunWriter,
    stages: Stages,
    key: str | None,
) -> None:
    found = attribute(RunFolder(writer.path), equal_power=True)
    wanted = worth_replaying(found.kernels, list(found.accounts))
    if key is not None:
        known = replay_cache.load(key)
        known = known[known["signature"].isin(wanted)]
        columns = {name: known[name].to_list() for name in known.columns if name != "key"}
        writer.append("replays", {**columns, "start_ns": None, "end_ns": None, "captured": None})
        wanted = [name for name in wanted if name not in set(known["signature"])]
    if not wanted:
        return
    keeper = Keeper(model, set(wanted))
    with taken_apart(model), keeper.keeping():
        generation(NEW_TOKENS)
    annotator.drain()
    cases = [keeper.cases[name] for name in wanted if name in keeper.cases]
    drains: list[Callable[[], Any]] = [meter.drain for meter in meters]
    with (
        Pump(writer, [lambda: ranges(annotator, "replay"), *drains]) as pump,
        stages.stage("Replaying", len(cases) * len(DUTIES)) as advance,
    ):
        for window in replay(device, cases, annotator, meters, advance):
            pump.check()
            row = {name: [value] for name, value in asdict(window).items()}
            writer.append("replays", {**row, "seconds": None, "dynamic_j": None, "floor_w": None})
        # Warmer than before: this is where the floor's slope over temperature comes from.
        idle(annotator, meters)
