"""What the runs of a study say, as a result file and as figures for docs/study.md.

python -m bench.study --of FOLDER [--name precision]: FOLDER is one of 'llmkern study'. Its runs were made elsewhere;
the file says on which device and with which versions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.result import case, metric, write
from llmkern.report.study_charts import write_pictures
from llmkern.study.claims import claims
from llmkern.study.collect import MEASURES, PHASES, collect, pooled
from llmkern.study.execute import open_study
from llmkern.study.statement import state

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", type=Path, required=True, help="folder of a study")
    parser.add_argument("--name", default="precision")
    parser.add_argument("--code", default="", help="commit whose code made the runs")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    arguments = parser.parse_args()
    collection = collect([arguments.of])
    study = open_study(arguments.of)
    configurations = pooled(collection.runs)
    facts = collection.runs[0].facts
    books = collection.books()
    more: dict[str, Any] = {
        "code": arguments.code,
        "recorded": {"started": facts.started, "versions": {k: v for k, v in facts.versions.items() if v}},
        "claims": [{"said": c.said, "verdict": c.verdict, "numbers": list(c.numbers)} for c in claims(configurations)],
        "books": {name: float(books[name].sum()) for name in books.columns if name != "run"},
        "failed": study.failed,
        "seconds": round(sum(study.took_s.values()), 1),
    }
    cases = [_case(one) for one in configurations]
    print(write(f"study-{arguments.name}", cases, arguments.results, facts.device.name, **more))
    told = state(collection, study.title, study.failed)
    for file in write_pictures(told.figures, arguments.figures / arguments.name):
        if file.suffix == ".png":
            # One form is enough beside the text.
            file.unlink()


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
    """Return the lines of docs/study.md: every claim, what became of it, and the numbers."""
    rows = ["| claim | here | numbers |", "|---|---|---|"]
    for claim in document["claims"]:
        if claim["verdict"] != "not measured":
            rows.append(f"| {claim['said']} | **{claim['verdict']}** | {'<br>'.join(claim['numbers']) or '–'} |")
    return rows


if __name__ == "__main__":
    main()
