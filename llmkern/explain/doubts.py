"""What is uncertain about a run, in sentences with the number that makes it so."""

from __future__ import annotations

import numpy as np

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.energy.phases import FIRST_LIMIT
from llmkern.attribute.time.operators import Identified
from llmkern.estimate import LEAST_FOR_INTERVAL
from llmkern.explain.compare import OVERLAP_LIMIT
from llmkern.runfolder import RunFolder
from llmkern.runfolder import vocabulary as word
from llmkern.runfolder.facts import RunFacts
from llmkern.runfolder.vocabulary import DECODE, DRIFT, PREFILL, STEP_NS
from llmkern.text import quantity

# Above this the recorder changes the run too much for its gaps to be taken at face value.
RECORDER_LIMIT = 0.05
# Decode by difference and by ranges measure the same thing twice; further apart one of them is disturbed.
AGREEMENT_LIMIT = 0.02
SENSOR_LIMIT = 0.03
# Kernels and gaps have to add up to what the counter moved, to within this share.
CLOSURE_LIMIT = 0.05
# A capture whose phase is shorter than the weighed one by more than this is of other work.
WORKLOAD_LIMIT = 0.3
# A difference of less than this share of its parts says little.
LEAST_SHARE = 0.15
# So many s more the first generation of a length has to take to be told of.
FIRST_S = 0.2
_THROTTLE = {
    0x4: "the software power cap",
    0x8: "a hardware slowdown",
    0x20: "the software thermal limit",
    0x40: "the hardware thermal limit",
    0x80: "the hardware power brake",
}


def doubts(run: RunFolder, attribution: Attribution) -> list[str]:
    """Return one sentence per thing that limits what the report may claim."""
    return [
        *_interruption(run),
        *run.problems,
        *_weights(run.facts),
        *_prompts(run.facts),
        *_clock(run),
        *_energy(run, attribution),
        *_first_of_its_length(run, attribution),
        *_recorder(run, attribution),
        *_agreement(attribution),
        *_operators(attribution.identified),
        *_groups(attribution),
        *_throttling(run),
    ]


def _interruption(run: RunFolder) -> list[str]:
    if run.complete:
        return []
    if run.status == word.RECORDING:
        return ["This run is incomplete: it is being recorded right now. What follows rests on what is written so far."]
    reason = f": {run.facts.reason}" if run.facts.reason else " before it ended, without a word (killed?)"
    return [
        f"This run is incomplete; its recording stopped{reason}. What follows rests on what was written until then."
    ]


def _weights(facts: RunFacts) -> list[str]:
    model = facts.model
    return [model.weights_note] if model is not None and model.weights == "random" and model.weights_note else []


def _prompts(facts: RunFacts) -> list[str]:
    source = facts.prompts.source if facts.prompts is not None else ""
    # The other sources leave nothing out.
    return [f"Prompts: {source}."] if source.startswith("the first") or "no tokenizer" in source else []


def _clock(run: RunFolder) -> list[str]:
    """Say where the wall clock was set during the recording: times before and after do not belong together."""
    looks = run.table("clocks").sort_values("monotonic_ns")
    offset = (looks["timestamp_ns"] - looks["monotonic_ns"]).to_numpy()
    changes, passed = np.diff(offset), np.diff(looks["monotonic_ns"].to_numpy())
    stepped = np.abs(changes) > STEP_NS + DRIFT * passed
    if not stepped.any():
        return []
    return [
        f"The system clock was set by {changes[stepped].sum() / 1e9:+,.3f} s during the recording: times before and "
        "after it do not belong together; trace the run again."
    ]


def _energy(run: RunFolder, attribution: Attribution) -> list[str]:
    weighed = attribution.weighed
    if weighed is None and run.facts.imported is not None:
        nothing = "No phase has a GPU record of any length: there is nothing to take shares of."
        return [
            *([] if attribution.accounts else [nothing]),
            "The capture holds no energy, only time: import it again with --energy RUN, a run of the same workload "
            "that llmkern weighed, for joules.",
            *(f"The capture lacks {what}." for what in run.facts.imported.missing),
            *run.facts.imported.told,
            *_overlap(attribution),
        ]
    if run.facts.options.weigh_only:
        return ["No kernels were recorded (--weigh-only): latency and joules of each phase only."]
    if run.facts.options.annotate_only and run.facts.imported is None:
        return [
            "No kernels were recorded (--annotate-only): export the profiler's capture and complete this run with "
            f"'llmkern import CAPTURE.sqlite --energy {run.path}'.",
        ]
    if weighed is None:
        return ["No complete weigh window was recorded, so there are no latencies or joules per phase."]
    rounds = len(next(iter(weighed.phases.values())).latency_samples_s) if weighed.phases else LEAST_FOR_INTERVAL
    if rounds < LEAST_FOR_INTERVAL:
        return [f"{rounds} round(s) of windows give no interval: use --repeats 10.", *_of_energy(run, attribution)]
    return _of_energy(run, attribution)


def _of_energy(run: RunFolder, attribution: Attribution) -> list[str]:
    weighed = attribution.weighed
    assert weighed is not None
    if any(p.energy_j is None for p in weighed.phases.values()):
        where = run.facts.device.counter_source
        if run.facts.sensors and not run.has("energy"):
            return ["There is no energy: table energy, which holds the counter's ticks, is not there; time only."]
        return [f"There is no energy: {where} gave no counter on this machine ('llmkern doctor' says why); time only."]
    found = []
    if attribution.marginals is None:
        found.append(
            "Kernels are given equal power here: energy by duration, so that a light kernel counts too much and a "
            "heavy one too little; without --quick operators are replayed to tell them apart."
        )
    if run.facts.imported is not None:
        found += [*run.facts.imported.told, *_of_another_workload(attribution), *_overlap(attribution)]
    found += _sensors(run)
    found += _too_short(run, attribution)
    found += _closure(attribution)
    if weighed.samples_j is not None and weighed.counter_j:
        apart = weighed.samples_j / weighed.counter_j - 1
        if abs(apart) > SENSOR_LIMIT:
            found.append(
                f"The driver's power samples integrate to {apart:+.1%} of the energy counter; the counter is used."
            )
    floor, mean_c = weighed.floor, weighed.temperature_c
    if floor is not None and mean_c is not None and floor.highest_c is not None and floor.lowest_c is not None:
        beyond = max(mean_c - floor.highest_c, floor.lowest_c - mean_c)
        if beyond > 2:
            found.append(
                f"The run was at {mean_c:.0f} °C, the idle floor was measured at {floor.lowest_c:.0f}-"
                f"{floor.highest_c:.0f} °C and extended by {beyond:.0f} °C."
            )
    return found


def _first_of_its_length(run: RunFolder, attribution: Attribution) -> list[str]:
    """Say what a generation costs whose lengths were not met before: whoever serves meets them all the time."""
    plan, weighed = run.facts.plan, attribution.weighed
    if plan is None or plan.first_generate_s is None or weighed is None or not {PREFILL, DECODE} <= set(weighed.phases):
        return []
    first, steps = plan.first_generate_s, plan.new_tokens - 1
    later = weighed.phases[PREFILL].latency_s + weighed.phases[DECODE].latency_s.scaled(steps)
    most = later.value if later.high is None else later.high
    if first < FIRST_LIMIT * most or first - most < FIRST_S:
        return []
    names = attribution.timeline.kernels["name"].astype(str)
    why = ""
    if names.str.contains("cudnn").any():
        why = " (cuDNN plans its attention for each length of the cache; --no-cudnn-attention does without)"
    return [
        f"The first generation of these lengths took {quantity(first, 's')}, later ones {quantity(later.value, 's')}: "
        f"lengths that were not met before take {quantity((first - later.value) / steps, 's')} more for each token"
        f"{why}, which is in no figure here, and in those of a server that meets new ones all the time."
    ]


def _overlap(attribution: Attribution) -> list[str]:
    """Say of which phase kernels ran at the same time, so that their times add up to more than it took."""
    found = []
    for phase, account in attribution.accounts.items():
        rows = attribution.kernels_of(phase)
        traced = attribution.timeline.kernels
        streams = traced.loc[traced["phase"] == phase, "stream"]
        together_s = float(rows["duration_ns"].sum()) / 1e9 - account.busy_s
        if together_s > OVERLAP_LIMIT * account.busy_s and streams.nunique() > 1:
            found.append(
                f"Kernels of {streams.nunique()} streams overlap for {quantity(together_s, 's')} of {phase}: their "
                "times, and their shares of it, add up to more than the device was busy; a diff has that as overlap."
            )
    return found


def _of_another_workload(attribution: Attribution) -> list[str]:
    """Say of which phase a capture shows another amount of work than the run whose energy it was given.

    A recorder may make a run slower; it makes none faster, and changes no number of launches.
    """
    found = []
    for phase, account in attribution.accounts.items():
        own = attribution.timeline.phases
        rows = own[own["phase"] == phase]
        units = max(1, int(rows["tokens"].sum()))
        traced_s = float((rows["busy_ns"] + rows["gap_ns"]).sum()) / 1e9 / units
        weighed_s = account.weight.latency_s.value
        if len(rows) and weighed_s > 0 and traced_s < (1 - WORKLOAD_LIMIT) * weighed_s:
            found.append(
                f"The capture is not of the weighed workload: its {phase} takes {quantity(traced_s, 's')} with "
                f"{rows['kernels'].sum() / units:,.0f} launches, the weighed one {quantity(weighed_s, 's')} (limit "
                f"{WORKLOAD_LIMIT:.0%} less): its joules are not those of these kernels; import it with the energy of "
                "the same model, precision, batch and lengths."
            )
    return found


def _closure(attribution: Attribution) -> list[str]:
    """Say of which phase kernels and gaps, or what replays say of them, do not add up to what the counter says."""
    found = []
    for phase, closure in attribution.closures.items():
        error = closure.error.value
        if abs(error) > CLOSURE_LIMIT:
            much = f"{abs(error):.0%} {'more' if error > 0 else 'less'}"
            found.append(
                f"The idle floor and replays alone predict {much} for {phase} than the counter says (limit "
                f"{CLOSURE_LIMIT:.0%}): the split between its kernels is as doubtful."
            )
    for account in attribution.accounts.values():
        energy, residual_j = account.weight.energy_j, account.residual_j
        if energy is None or residual_j is None or abs(residual_j) <= CLOSURE_LIMIT * energy.value:
            continue
        less = "less" if residual_j > 0 else "more"
        found.append(
            f"Kernels and gaps of {account.phase} add up to {abs(residual_j) / energy.value:.0%} {less} than the "
            f"counter says (limit {CLOSURE_LIMIT:.0%}): the traced run was not like the weighed one; trace it again, "
            "or, for a capture, import it with the energy of the same workload."
        )
    return found


def _sensors(run: RunFolder) -> list[str]:
    """Say what this board's sensors cannot tell."""
    meter = run.facts.sensors.get(word.NVML_COUNTER)
    missing = meter.unsupported if meter is not None else {}
    found = []
    if "power_samples" in missing:
        found.append(
            f"This board gives no 20 ms power samples ({missing['power_samples']}): energy by ranges rests on the "
            "counter's ticks alone, and is the coarser for it."
        )
    if "memory_average" in missing:
        found.append(
            f"This board gives no memory power ({missing['memory_average']}): HBM cannot be told from the rest."
        )
    return found


def _too_short(run: RunFolder, attribution: Attribution) -> list[str]:
    """Say where a phase is too small a part of what was weighed for its energy to be known."""
    weighed = attribution.weighed
    if weighed is None or not {"prefill", "decode"} <= set(weighed.phases):
        return []
    tokens = run.facts.options.new_tokens - 1
    decode_s = tokens * weighed.phases["decode"].latency_s.value
    share = decode_s / (decode_s + weighed.phases["prefill"].latency_s.value)
    if share >= LEAST_SHARE:
        return []
    return [
        f"Too short to attribute decode: it is {share:.0%} of generate({tokens + 1}), less than {LEAST_SHARE:.0%}, and "
        "its energy the difference of two nearly equal ones; use more --new-tokens."
    ]


def _recorder(run: RunFolder, attribution: Attribution) -> list[str]:
    found = []
    for name, recorder in run.facts.recorders.items():
        if recorder.lost:
            what = "operators" if name == word.INSPECT else "launches and busy time"
            found.append(
                f"CUPTI dropped {recorder.dropped_records + recorder.failed_allocations + recorder.failed_decodes} "
                f"records and lost {recorder.lost_timestamps} time stamps in pass {name}: {what} are too low."
            )
    for account in attribution.accounts.values():
        effect = account.recorder_effect
        if effect is None or effect.low is None or effect.high is None:
            continue
        told = f"{account.phase} {abs(effect.value):.1%} [{abs(effect.low):.1%}, {abs(effect.high):.1%}]"
        if effect.low > RECORDER_LIMIT:
            found.append(
                f"The recorder makes {told} longer (limit {RECORDER_LIMIT:.0%}); gap time is taken from the weighed "
                "run, their shares from the traced one."
            )
        elif effect.high < -RECORDER_LIMIT:
            found.append(f"Under the recorder {told} was faster, which no recorder does: the host was not the same.")
    for account in attribution.accounts.values():
        if account.is_traced_longer:
            share = account.traced_busy_s / account.weight.latency_s.value
            found.append(
                f"Under the recorder the kernels of {account.phase} alone took {share:.0%} of its weighed latency: "
                "how it splits is that of the traced run, scaled to the weighed one, and of its gaps nothing is known. "
                "Trace it again on a quiet host."
            )
    options = attribution.run.facts.options
    # Where no timeline was to be recorded, that has been said.
    recorded = attribution.run.facts.imported is not None or not (options.weigh_only or options.annotate_only)
    for weight in attribution.only_weighed if recorded else ():
        found.append(
            f"The timeline holds no whole {weight.phase}: its latency and energy are as weighed, where they went is "
            "not known."
        )
    if attribution.weighed is not None:
        found += attribution.weighed.unknown.values()
    if attribution.devices > 1:
        facts = attribution.run.facts
        others = facts.imported is not None and len(facts.imported.devices) > 1
        found.append(
            f"Kernels ran on {attribution.devices} devices; the accounts are those of GPU {facts.device.index}"
            f"{': with --gpu N, report and export are of another' if others else ''}."
        )
    return found


def _agreement(attribution: Attribution) -> list[str]:
    found = []
    weighed = attribution.weighed
    if weighed is None or "decode" not in weighed.phases:
        return []
    decode = weighed.phases["decode"]
    pairs = [("latency", decode.latency_by_ranges_s, decode.latency_s)]
    if decode.energy_by_ranges_j is not None and decode.energy_j is not None:
        pairs.append(("energy", decode.energy_by_ranges_j, decode.energy_j))
    for what, by_ranges, by_difference in pairs:
        apart = by_ranges.value / by_difference.value - 1
        if abs(apart) > AGREEMENT_LIMIT:
            found.append(
                f"Decode {what} by ranges is {apart:+.1%} from decode by difference (limit {AGREEMENT_LIMIT:.0%})."
            )
    return found


def _operators(identified: Identified | None) -> list[str]:
    if identified is None or not identified.mismatches:
        return []
    first = identified.mismatches[0]
    where = first.phase if first.token is None else f"{first.phase} token {first.token}"
    return [
        f"{len(identified.mismatches)} traced steps differ from those inspected, the first at kernel {first.position} "
        f"of {where}; the operators of {1 - identified.share:.1%} of the kernels are not identified."
    ]


def _groups(attribution: Attribution) -> list[str]:
    marginals = attribution.marginals
    if marginals is None or not marginals.groups:
        return []
    largest = max(marginals.groups, key=len)
    return [
        f"{sum(map(len, marginals.groups))} kernels that no replay tells apart form {len(marginals.groups)} group(s), "
        f"the largest of {len(largest)}: each got a share by its length, blocks, bytes and FLOPs, right to a factor of "
        "two."
    ]


def _throttling(run: RunFolder) -> list[str]:
    """Say what held the clock down in the windows that count: the tool's own test and replays are no part of a run."""
    readings = run.table("power", ["timestamp_ns", "throttle"]).dropna()
    ranges = run.table("ranges", where={"pass": "weigh"})
    inside = np.zeros(len(readings), bool)
    for start_ns, end_ns in ranges.loc[ranges["category"] == word.WINDOW, ["start_ns", "end_ns"]].itertuples(
        index=False
    ):
        inside |= readings["timestamp_ns"].between(start_ns, end_ns).to_numpy()
    throttle = readings.loc[inside, "throttle"].astype("int64")
    if throttle.empty:
        return []
    found = []
    for bit, name in _THROTTLE.items():
        share = float(((throttle & bit) != 0).mean())
        if share > 0.01:
            found.append(f"The clock was held down by {name} in {share:.0%} of the readings while the run was weighed.")
    return found
