"""What runs of a server say of how requests arrive, as a result file and as figures for docs/serving.md.

python -m bench.serving --of FOLDER --code COMMIT [--plain RUN --alone RUN] [--pair FOLDER FOLDER] [--recorded RUN]:
FOLDER is one of 'llmkern serve-study'; --alone is a run of one with requests that came one by one, --plain one of
'llmkern trace' with their prompt and answer; --pair was made with and without cuDNN's attention; in --recorded every
request was recorded. They were made elsewhere; the file says on which device and with which versions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from bench.result import case, interval, metric, write
from bench.study import FIGURES
from llmkern.attribute.iterations import IterationKind
from llmkern.estimate import Estimate
from llmkern.report.study_charts import write_pictures
from llmkern.runfolder import RunFolder
from llmkern.serve.figures import figures
from llmkern.serve.statement import Arrivals, ServeStatement, ratio, read, state
from llmkern.study.collect import GENERATE, read_run
from llmkern.study.execute import RUNS
from llmkern.text import short_name

# The order that the study behind this project found, from the least joules per request to the most.
ORDER = ("fixed", "uniform", "burst", "sequential")
# Iterations are told apart by their batch, where there are so many.
_BATCHES, _LEAST = (0, 1, 4, 8, 16, 32, 64, 128, 256), 20
_WORDS = {"prefill": "one that prefills", "decode": "one that only decodes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", type=Path, required=True, help="folder of a serving study")
    parser.add_argument("--plain", type=Path, help="run of 'llmkern trace' of one request")
    parser.add_argument("--alone", type=Path, help="run of a server with the same request, one by one")
    parser.add_argument("--pair", nargs=2, type=Path, help="the same, with and without cuDNN's attention")
    parser.add_argument("--recorded", type=Path, help="run of a server with every request recorded")
    parser.add_argument("--code", default="", help="commit whose code made the runs")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    told = state(sorted((arguments.of / RUNS).iterdir()), {})
    first = told.arrivals[0].facts
    more: dict[str, Any] = {
        "code": arguments.code,
        "recorded": {"started": first.started, "versions": {k: v for k, v in first.versions.items() if v}},
        "order": order(told.arrivals),
        "uncertain": list(told.doubts),
        "failed": told.failed,
    }
    if arguments.plain is not None and arguments.alone is not None:
        more["alone"] = _alone(RunFolder(arguments.plain), read(arguments.alone))
    if arguments.pair is not None:
        more["cudnn"] = _pair(*(state(sorted((folder / RUNS).iterdir()), {}) for folder in arguments.pair))
    more["by_batch"] = by_batch(told.arrivals)
    if arguments.recorded is not None:
        more["recorded_iterations"] = [_kernels(kind) for kind in read(arguments.recorded).kinds]
    cases = [_case(one) for one in told.arrivals]
    print(write("serving", cases, arguments.results, first.device.name, **more))
    for file in write_pictures(figures(told.arrivals), arguments.figures / "serving"):
        if file.suffix == ".png":
            # One form is enough beside the text.
            file.unlink()


def order(
    arrivals: tuple[Arrivals, ...], of: Callable[[Arrivals, Arrivals], Estimate | None] = ratio
) -> list[dict[str, Any]]:
    """Return of neighbours in ORDER what the first takes of the second, and whether that is less (None: not known).

    Of several patterns of one kind the one that takes least stands for it.
    """
    least: dict[str, Arrivals] = {}
    for one in arrivals:
        kind = one.pattern.partition(":")[0]
        if one.request_j is not None and (kind not in least or _joules(one).value < _joules(least[kind]).value):
            least[kind] = one
    found = []
    for less, more in pairwise([least[kind] for kind in ORDER if kind in least]):
        share = of(less, more)
        assert share is not None
        known = share.low is not None and share.high is not None
        verdict = None if not known or share.low <= 1 <= share.high else share.value < 1  # type: ignore[operator]
        found.append({"less": less.pattern, "more": more.pattern, "ratio": metric(share, "1"), "holds": verdict})
    return found


def _joules(one: Arrivals) -> Estimate:
    assert one.request_j is not None
    return one.request_j


def _alone(run: RunFolder, served: Arrivals) -> dict[str, Any]:
    """Return a request in a plain run beside the same one alone in a server; raises SystemExit for another one."""
    measures, options = read_run(run).measures[GENERATE], run.facts.options
    lengths = {tuple(pair) for pair in served.found.requests[["prompt_tokens", "output_tokens"]].to_numpy().tolist()}
    if served.pattern != "sequential" or lengths != {(options.prompt_tokens, options.new_tokens)}:
        raise SystemExit(f"--alone serves {served.pattern} {lengths}, not what --plain generates, one by one.")
    assert served.own_j is not None
    return {
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "requests": len(served.found.requests),
        "plain_j": metric(measures["energy_per_request"], "J"),
        "plain_s": metric(measures["latency"], "s"),
        "served_j": metric(served.own_j, "J"),
        "served_s": metric(served.latency_s[0], "s"),
    }


def _pair(with_it: ServeStatement, without: ServeStatement) -> list[dict[str, Any]]:
    """Return by pattern what a request takes with cuDNN's attention as a multiple of what it takes without."""
    others = {one.pattern: one for one in without.arrivals}
    found = []
    for one in with_it.arrivals:
        share = ratio(one, others[one.pattern])
        assert share is not None
        found.append({"pattern": one.pattern, "requests": len(one.found.requests), "ratio": metric(share, "1")})
    return found


def by_batch(arrivals: tuple[Arrivals, ...]) -> list[dict[str, Any]]:
    """Return what iterations that only decode take by how many requests are in them, over all patterns."""
    spans = pd.concat([run.iterations for one in arrivals for run in one.runs])
    spans = spans[(spans["prefill_tokens"] == 0) & spans["energy_j"].notna()]
    found = []
    for low, high in pairwise(_BATCHES):
        own = spans[(spans["batch"] > low) & (spans["batch"] <= high)]
        if len(own) >= _LEAST:
            seconds = (own["end_ns"] - own["start_ns"]) / 1e9
            means = {"s": seconds.mean(), "J": own["energy_j"].mean()}
            means |= {"J per token": own["energy_j"].sum() / own["decode_tokens"].sum()}
            entry = {"batch": [low + 1, high], "iterations": len(own)}
            found.append(entry | {unit: metric(float(value), unit) for unit, value in means.items()})
    return found


def _kernels(kind: IterationKind) -> dict[str, Any]:
    return {
        "kind": kind.kind,
        "batch": kind.batch,
        "span": metric(kind.span_s, "s"),
        "busy": metric(kind.busy_s, "s"),
        "longest": [{"name": name, "s": seconds} for name, seconds in kind.longest],
    }


def _case(one: Arrivals) -> dict[str, Any]:
    found = one.found
    known: dict[str, tuple[Estimate | float | None, str]] = {
        "request_j": (one.request_j, "J"),
        "own_j": (one.own_j, "J"),
        "saved": (one.saved, "1"),
        "idle_share": (one.idle_share, "1"),
        "residual_share": (
            max((r.residual_j / r.counter_j for r in one.runs if r.counter_j), key=abs, default=None),
            "1",
        ),
        "mean_w": (one.mean_w, "W"),
        "mean_batch": (one.mean_batch, "1"),
        "busy_share": (one.busy_share, "1"),
        "window_s": (sum(run.seconds for run in one.runs), "s"),
        "drain_s": (found.drain_s, "s"),
        "late_s": (one.latest_s, "s"),
    }
    for name, values in (("ttft", one.ttft_s), ("between", one.between_s), ("latency", one.latency_s)):
        known |= {f"{name}_p{q}": (value, "s") for q, value in zip((50, 90, 99), values, strict=False)}
    for kind in one.kinds:
        known |= {
            f"{kind.kind} iteration: {name}": value
            for name, value in (
                ("batch", (kind.batch, "1")),
                ("launches", (kind.launches, "1")),
                ("span_s", (kind.span_s, "s")),
                ("busy_s", (kind.busy_s, "s")),
                ("energy", (kind.joules, "J")),
                ("gaps", (kind.gaps_j, "J")),
            )
        }
    metrics = {name: metric(value, unit) for name, (value, unit) in known.items() if value is not None}
    parameters = {"requests": len(found.requests), "runs": len(one.runs), "status": one.status}
    return case(one.pattern, parameters, metrics, None)


def table(document: dict[str, Any]) -> list[str]:
    """Return the lines of docs/serving.md: every pattern, whether the study's order holds, a request alone."""
    rows = [
        "| arrivals | requests | J per request | saved | idle | batch | first token p50 / p99, s | books left open |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in sorted(document["cases"], key=lambda c: c["metrics"].get("request_j", {"value": 0.0})["value"]):
        m = found["metrics"]
        joules = interval(m["request_j"], 1.0, 1) if "request_j" in m else "–"
        saved = interval(m["saved"], 100.0, 1) + " %" if "saved" in m else "–"
        idle, rest = (_share(m, name, places) for name, places in (("idle_share", 0), ("residual_share", 2)))
        waiting = " / ".join(f"{m[f'ttft_p{q}']['value']:.3g}" for q in (50, 99) if f"ttft_p{q}" in m)
        batch, count = f"{m['mean_batch']['value']:.1f}", found["parameters"]["requests"]
        rows.append(f"| {found['name']} | {count} | {joules} | {saved} | {idle} | {batch} | {waiting} | {rest} |")
    if document["order"]:
        words = {True: "takes less than", False: "takes **more** than", None: "cannot be told from"}
        told = [
            f"{o['less']} {words[o['holds']]} {o['more']}: x {interval(o['ratio'], 1.0, 3)}" for o in document["order"]
        ]
        rows += ["", f"The study's order ({' < '.join(ORDER)}): {'; '.join(told)}."]
    if "alone" in document:
        m = document["alone"]
        rows += [
            "",
            f"{m['requests']} requests of {m['prompt_tokens']} + {m['new_tokens']} tokens alone in the server take "
            f"{interval(m['served_j'], 1.0, 0)} J in {m['served_s']['value']:.2f} s each, the same in a plain run "
            f"{interval(m['plain_j'], 1.0, 0)} J in {interval(m['plain_s'], 1.0, 2)} s.",
        ]
    if "cudnn" in document:
        told = [f"x {interval(o['ratio'], 1.0, 2)} {o['pattern']}" for o in document["cudnn"]]
        count = document["cudnn"][0]["requests"]
        rows += ["", f"With cuDNN's attention ({count} requests): {', '.join(told)}."]
    rows += ["", *_batches(document["by_batch"])]
    for entry in document.get("recorded_iterations", []):
        longest = entry["longest"][0]
        name = short_name(longest["name"])
        rows += [
            "",
            f"As recorded, an iteration of {entry['batch']:.0f} requests ({_WORDS[entry['kind']]}) has "
            f"{1e3 * entry['busy']['value']:.0f} of its {1e3 * entry['span']['value']:.0f} ms in kernels, "
            f"{1e3 * longest['s']:.0f} ms in `{name}`.",
        ]
    return rows


def _batches(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        "| requests in an iteration that only decodes | iterations | ms | J | J per token |",
        "|---|---|---|---|---|",
    ]
    for entry in found:
        low, high = entry["batch"]
        values = f"{1e3 * entry['s']['value']:.0f} | {entry['J']['value']:.1f} | {entry['J per token']['value']:.2f}"
        rows.append(f"| {low if low == high else f'{low} to {high}'} | {entry['iterations']:,} | {values} |")
    return rows


def _share(metrics: dict[str, Any], name: str, places: int) -> str:
    return f"{abs(metrics[name]['value']):.{places}%}" if name in metrics else "–"


if __name__ == "__main__":
    main()
