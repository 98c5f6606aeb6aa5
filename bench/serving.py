"""What runs of a server say of how requests arrive, as a result file and as figures for docs/serving.md.

python -m bench.serving --of FOLDER [--plain RUN] --code COMMIT: FOLDER is one of 'llmkern serve-study', RUN one of
'llmkern trace' with the prompt and answer of a request that came alone. They were made elsewhere; the file says on
which device and with which versions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.result import case, interval, metric, write
from bench.study import FIGURES
from llmkern.estimate import Estimate
from llmkern.report.study_charts import write_pictures
from llmkern.runfolder import RunFolder
from llmkern.serve.figures import figures
from llmkern.serve.statement import Arrivals, ratio, state
from llmkern.study.collect import GENERATE, read_run
from llmkern.study.execute import RUNS

# The order that the study behind this project found, from the least joules per request to the most.
ORDER = ("fixed", "uniform", "burst", "sequential")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", type=Path, required=True, help="folder of a serving study")
    parser.add_argument("--plain", type=Path, help="run of 'llmkern trace' of the same request")
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
    if arguments.plain is not None:
        more["plain"] = _plain(RunFolder(arguments.plain))
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


def _plain(run: RunFolder) -> dict[str, Any]:
    measures = read_run(run).measures[GENERATE]
    return {"run": run.path.name} | {
        name: metric(measures[key], unit)
        for name, key, unit in (("request_j", "energy_per_request", "J"), ("latency_s", "latency", "s"))
        if key in measures
    }


def _case(one: Arrivals) -> dict[str, Any]:
    found = one.found
    known: dict[str, tuple[Estimate | float | None, str]] = {
        "request_j": (one.request_j, "J"),
        "own_j": (one.own_j, "J"),
        "saved": (one.saved, "1"),
        "idle_share": (one.idle_share, "1"),
        "residual_share": (found.residual_j / found.counter_j if found.counter_j else None, "1"),
        "mean_w": (one.mean_w, "W"),
        "mean_batch": (one.mean_batch, "1"),
        "busy_share": (one.busy_share, "1"),
        "window_s": (found.seconds, "s"),
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
    return case(one.pattern, {"requests": len(found.requests), "status": one.status}, metrics, None)


def table(document: dict[str, Any]) -> list[str]:
    """Return the lines of docs/serving.md: every pattern, whether the study's order holds, a request alone."""
    rows = [
        "| arrivals | requests | J per request | saved | idle | batch | first token p50 / p99, s | books left open |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in document["cases"]:
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
    if "plain" in document:
        alone: dict[str, Any] = next((c["metrics"] for c in document["cases"] if c["name"] == "sequential"), {})
        plain = document["plain"]
        if "own_j" in alone and "request_j" in plain:
            rows += [
                "",
                f"A request alone in the server takes {interval(alone['own_j'], 1.0, 1)} J in "
                f"{alone['latency_p50']['value']:.2f} s, the same request in a plain run "
                f"{interval(plain['request_j'], 1.0, 1)} J in {interval(plain['latency_s'], 1.0, 2)} s.",
            ]
    return rows


def _share(metrics: dict[str, Any], name: str, places: int) -> str:
    return f"{metrics[name]['value']:.{places}%}" if name in metrics else "–"


if __name__ == "__main__":
    main()
