"""What the runs of a study say, as a result file and as figures for docs/study.md.

python -m bench.study --of FOLDER [FOLDER ...] [--name precision]: each is one of 'llmkern study'. Its runs were made
elsewhere; the file says on which device and with which versions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from bench.result import case, interval, metric, write
from llmkern.report.study_charts import write_pictures
from llmkern.runfolder import RunFolder
from llmkern.runfolder.vocabulary import GENERATE, PRECISIONS, PREFILL
from llmkern.study.claims import claims
from llmkern.study.collect import MEASURES, PHASES, collect, pooled
from llmkern.study.execute import open_study
from llmkern.study.statement import state

PASSES = ("warmup", "weigh")
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", type=Path, nargs="+", required=True, help="folders of studies that are told as one")
    parser.add_argument("--name", default="precision")
    parser.add_argument("--code", default="", help="commit whose code made the runs")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--settled", action="store_true", help="leave out the first round of windows of every run")
    arguments = parser.parse_args()
    collection = collect(arguments.of, Settled if arguments.settled else RunFolder)
    studies = [open_study(folder) for folder in arguments.of]
    failed = {name: reason for study in studies for name, reason in study.failed.items()}
    configurations = pooled(collection.runs)
    facts = collection.runs[0].facts
    books = collection.books()
    more: dict[str, Any] = {
        "code": arguments.code,
        "recorded": {"started": facts.started, "versions": {k: v for k, v in facts.versions.items() if v}},
        "claims": [{"said": c.said, "verdict": c.verdict, "numbers": list(c.numbers)} for c in claims(configurations)],
        "books": {name: float(books[name].sum()) for name in books.columns if name != "run"},
        "failed": failed,
        "seconds": round(sum(sum(study.took_s.values()) for study in studies), 1),
        # What the GPU was at it: without starting processes and loading weights.
        "passes_s": {
            name: round(sum(run.facts.pass_s.get(name, 0.0) for run in collection.runs), 1) for name in PASSES
        },
        "settled": arguments.settled,
        "lengths": [_lengths(RunFolder(run.folder)) for run in collection.runs],
        "boards": len({run.facts.device.uuid for run in collection.runs}),
        "rounds": sorted({len(run.weighed.phases[PREFILL].latency_samples_s) for run in collection.runs}),
    }
    cases = [_case(one) for one in configurations]
    print(write(f"study-{arguments.name}", cases, arguments.results, facts.device.name, **more))
    told = state(collection, studies[0].title, failed)
    for file in write_pictures(told.figures, arguments.figures / arguments.name):
        if file.suffix == ".png":
            # One form is enough beside the text.
            file.unlink()


class Settled(RunFolder):
    """A run without its first round of windows.

    Before the warm-up was as long as a weighed generation, that round held what is made for each length of the cache
    that was not met before: in 16 bits some 50 ms a token on an H100, two to three times what a token takes.
    """

    def table(self, name: str, columns: list[str] | None = None, where: Any = None) -> pd.DataFrame:
        frame = super().table(name, columns, where)
        return frame[frame["round"] != 0] if name == "ranges" and "round" in frame else frame


def _lengths(run: RunFolder) -> dict[str, Any]:
    """Return what the first generation of a run's lengths took, in s, and what the later ones did: median and ends."""
    ranges = run.table("ranges")
    found = ranges[(ranges["pass"] == "weigh") & (ranges["category"] == GENERATE)]
    found = found[found["new_tokens"] == found["new_tokens"].max()].sort_values("start_ns")
    took_s = ((found["end_ns"] - found["start_ns"]) / 1e9).to_list()
    plan = run.facts.plan
    first_s = plan.first_generate_s if plan is not None else None
    if first_s is None:
        first_s, *took_s = took_s
    later = {name: round(of(took_s), 4) for name, of in (("least_s", min), ("median_s", median), ("most_s", max))}
    steps = run.facts.options.new_tokens - 1
    return {
        "run": run.path.name,
        "first_s": round(first_s, 4),
        **later,
        "more_per_token_s": round((first_s - later["median_s"]) / steps, 5),
    }


def _case(one: Any) -> dict[str, Any]:
    metrics = {}
    for phase in PHASES:
        for name, unit in MEASURES.items():
            found = one.per(phase, name)
            if found is not None and name != "power":
                metrics[f"{phase}: {name}"] = metric(found, unit or "1")
    axes = one.axes
    words = [axes["model"], axes["precision"], axes["engine"], f"batch {axes['batch']}", axes["prompts"]]
    return case(" ".join(word for word in words if word), {**axes, "draws": len(one.runs)}, metrics, None)


def table(document: dict[str, Any]) -> list[str]:
    """Return the lines of docs/study.md: every claim, what became of it and the numbers; every configuration."""
    rows = ["| claim | here | numbers |", "|---|---|---|"]
    for claim in document["claims"]:
        if claim["verdict"] != "not measured":
            rows.append(f"| {claim['said']} | **{claim['verdict']}** | {'<br>'.join(claim['numbers']) or '–'} |")
    columns = [
        ("prefill: energy_per_effective_input_token", "prefill, mJ per input token", 1e3, 1),
        ("prefill: energy_per_computed_input_token", "per computed one", 1e3, 1),
        ("prefill: latency", "first token, ms", 1e3, 1),
        ("decode: latency_per_token", "between tokens, ms", 1e3, 1),
        ("decode: energy_per_output_token", "decode, J per output token", 1.0, 2),
    ]
    if not any(found["parameters"]["prompts"] for found in document["cases"]):
        # Without padding the two are one.
        del columns[1]
    titles = ["configuration", *(title for _, title, _, _ in columns)]
    rows += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for found in document["cases"]:
        known = [(found["metrics"].get(key), scale, digits) for key, _, scale, digits in columns]
        cells = [interval(value, scale, digits) if value else "–" for value, scale, digits in known]
        rows.append(f"| {found['name']} | {' | '.join(cells)} |")
    books, passes = document["books"], document["passes_s"]
    several = "s" if document["boards"] > 1 else ""
    neither = 100 * abs(books["residual_j"]) / books["counter_j"]
    told = (
        f"{len(document['lengths'])} runs of {max(document['rounds'])} rounds on {document['boards']} board{several}: "
        f"{document['seconds'] / 60:.1f} minutes, of which {sum(passes.values()) / 60:.1f} warm-up and windows; the "
        f"counter moved by {books['counter_j'] / 1e3:.1f} kJ, of which {neither:.2f}% are neither windows nor rest "
        "between them."
    )
    return [*rows, "", told, "", *_of_lengths(document["lengths"])]


def _of_lengths(lengths: list[dict[str, Any]]) -> list[str]:
    """Return what the first generation of a length took by precision: the median over the runs."""
    rows = ["| precision | first generation of its lengths, by later ones | ms more for each token |", "|---|---|---|"]
    for precision in PRECISIONS:
        own = [one for one in lengths if f"-{precision}-" in one["run"]]
        if own:
            ratios = [one["first_s"] / one["median_s"] for one in own]
            more_ms = [1e3 * one["more_per_token_s"] for one in own]
            times = f"x {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            more = f"{median(more_ms):.0f} ({min(more_ms):.0f} to {max(more_ms):.0f})"
            rows.append(f"| {precision} | {times} | {more} |")
    return rows


if __name__ == "__main__":
    main()
