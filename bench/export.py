"""How long a run of many kernels takes to export, and how large the file is.

python -m bench.export [--run RUN] [--kernels 1000000]

The large run is RUN repeated, as in bench.analysis; both traced passes go out, with host calls, gaps and joules.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from bench.analysis import DEFAULT_RUN, repeat_run
from bench.result import case, metric, write
from llmkern.exchange.exporting import SINKS, export_run
from llmkern.runfolder import RunFolder

MOST_S, MOST_BYTES = 30.0, 40e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=DEFAULT_RUN)
    parser.add_argument("--kernels", type=int, default=1_000_000)
    parser.add_argument("--to", nargs="*", choices=list(SINKS), default=["perfetto", "nsys"])
    parser.add_argument("--results", type=Path)
    chosen = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "large"
        kernels = repeat_run(RunFolder(chosen.run), chosen.kernels, folder)
        for to in chosen.to:
            begin_s = time.perf_counter()
            file = export_run(folder, to)
            seconds = time.perf_counter() - begin_s
            size = sum(f.stat().st_size for f in ([file] if file.is_file() else file.iterdir()))
            metrics = {"kernels": metric(kernels, "1"), "export": metric(seconds, "s"), "size": metric(size, "B")}
            # Only Perfetto's file has a bar: it is opened in a browser.
            passed = seconds <= MOST_S and size <= MOST_BYTES if to == "perfetto" else None
            cases.append(case(to, {"run": chosen.run.name}, metrics, passed))
            print(f"{to}: {kernels:,} kernels in {seconds:.1f} s, {size / 1e6:.1f} MB", flush=True)
    print(write("export", cases, chosen.results))


if __name__ == "__main__":
    main()
