"""How late the client of a serving study sends: against a server in another process, at rates up to 400 a second.

python -m bench.client [--seconds 10]: requests go out at fixed intervals to a stub that streams four tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.result import case, metric, write
from llmkern.progress import Stages
from llmkern.record.options import TraceOptions
from llmkern.runfolder import RunFolder
from llmkern.serve.by_url import Asked, serve_by_url
from llmkern.serve.remote import Address
from llmkern.serve.session import ServeOptions
from llmkern.study.plan import Lengths

RATES = (20, 100, 200, 400)
# What the issue asks for.
BAR_S = 0.002
_FOUR = Lengths(4.0, 0.0, 4, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    url = ours.recv()
    found = []
    try:
        for rate in RATES:
            found.append(_measured(url, rate, arguments.seconds))
            print(found[-1]["name"], {k: v["value"] for k, v in found[-1]["metrics"].items()}, flush=True)
    finally:
        process.terminate()
    print(write("client", found, arguments.results))


def _serve(pipe: Any) -> None:
    from tests.serve.stub import stub

    with stub(token_s=0.001) as server:
        pipe.send(server.url)
        pipe.recv()


def _measured(url: str, rate: int, seconds: float) -> dict[str, Any]:
    count = round(rate * seconds)
    with tempfile.TemporaryDirectory() as folder:
        options = ServeOptions(
            TraceOptions("tiny", out=Path(folder) / "run"), f"fixed:{1 / rate:g}", count, _FOUR, _FOUR, patience_s=30.0
        )
        requests = RunFolder(serve_by_url(options, Asked(Address(url, "tiny")), Stages(quiet=True))).table("requests")
    late_s = ((requests["sent_ns"] - requests["intended_ns"]) / 1e9).to_numpy()
    p50, p99, most = np.percentile(late_s, [50, 99, 100])
    metrics = {"p50": metric(float(p50), "s"), "p99": metric(float(p99), "s"), "most": metric(float(most), "s")}
    metrics["within"] = metric(float((late_s <= BAR_S).mean()), "1")
    metrics["answered"] = metric(float((requests["status"] == "finished").mean()), "1")
    return case(f"{rate} a second", {"requests": count}, metrics, bool(p99 <= BAR_S))


def table(document: dict[str, Any]) -> list[str]:
    """Return the lines of docs/serving.md."""
    rows = ["| rate | p50 late | p99 late | at most | within 2 ms |", "|---|---|---|---|---|"]
    for found in document["cases"]:
        times = [f"{1e3 * found['metrics'][name]['value']:.2f} ms" for name in ("p50", "p99", "most")]
        rows.append(f"| {found['name']} | {' | '.join(times)} | {found['metrics']['within']['value']:.2%} |")
    return rows


if __name__ == "__main__":
    main()
