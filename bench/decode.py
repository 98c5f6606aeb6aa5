"""Decode by engine, word size and batch: time and joules of a step, of a token, and of the least that it could take.

python -m bench.decode --runs DIR [--only NAME ...]: each case is one weighed run (llmkern.trace --annotate-only) in a
process of its own; cases that a result file has already are kept unless they are run again. --from FOLDER takes the
runs that a study left there instead (llmkern study bench/plans/decode.toml), with the commit whose code made them as
--code.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.result import RESULTS, case, commit, metric, slug, write
from llmkern.attribute.attribution import attribute
from llmkern.estimate import Estimate
from llmkern.runfolder import RunFolder
from llmkern.workload.fused import SHORTLIST_BATCH
from llmkern.workload.models import build_config, find_model, shape_of

# What an H100 reads, and what a byte read costs above the idle floor: measured with streams of cold weights.
READ_BYTES_PER_S, J_PER_BYTE = 3.09e12, 135e-12
PROMPT_TOKENS = 512
# What a step is told apart into, by kinds of kernels.
GROUPS = {
    "products": ["gemm", "gemv"],
    "conversions": ["quantize", "dequantize", "outlier", "cast"],
    "attention": ["attention"],
    "norms": ["norm"],
}
_ENGINES = {
    "fused": ("bf16", "int8", "int4"),
    "graph": ("bf16",),
    "eager": ("bf16", "int8", "int4"),
}


def cases() -> dict[str, list[str]]:
    """Return the options of every case by its name; those that the argument rests on come first."""
    found = {}
    for model, batches in (("qwen-7b", (1, 8, 16, 64)), ("llama-8b", (1,))):
        for batch in batches:
            for engine, precisions in _ENGINES.items():
                for precision in precisions:
                    if model == "llama-8b" and engine == "eager":
                        continue
                    # The slow ones in fewer tokens.
                    tokens = 128 if engine != "eager" else 32
                    found[f"{model} {precision} {engine}, batch {batch}"] = [
                        *("--model", model, "--precision", precision, "--engine", engine, "--batch", str(batch)),
                        *("--new-tokens", str(tokens), "--prompt-tokens", str(PROMPT_TOKENS), "--repeats", "5"),
                    ]
    return found


def main() -> None:
    every = cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder for the run folders")
    parser.add_argument("--from", dest="study", type=Path, help="folder with run folders that are there already")
    parser.add_argument("--code", default="", help="commit whose code made the runs of --from")
    parser.add_argument("--only", nargs="*", default=list(every), help="cases, by any part of their names")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    gpu = of_runs(arguments.study) if arguments.study is not None else None
    file = (arguments.results or RESULTS) / f"decode-{slug(gpu)}.json"
    kept = {c["name"]: c for c in json.loads(file.read_text())["cases"]} if file.exists() else {}
    if arguments.study is not None:
        for folder in sorted(arguments.study.glob("*/run.json")):
            run = RunFolder(folder.parent)
            name = named(run)
            if run.complete and name in every:
                note = f"code of {arguments.code}; {run.facts.options.repeats} windows" if arguments.code else ""
                kept[name] = told_of(name, every[name], run, note)
        # Of the machine that ran them: this one has no GPU.
        more = {"environment": json.loads(file.read_text())["environment"]} if file.exists() else {}
        write("decode", [kept[n] for n in every if n in kept], arguments.results, gpu, **more)
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for name in [n for n in every if any(n == part or (part not in every and part in n) for part in arguments.only)]:
        kept[name] = measured(name, every[name], arguments.runs)
        told = {k: round(v["value"], 4) for k, v in kept[name]["metrics"].items()}
        print(name, told, kept[name]["note"][-200:], flush=True)
        # Rewritten after every run: a session that ends early keeps what it measured.
        write("decode", [kept[n] for n in every if n in kept], arguments.results)


def of_runs(folder: Path) -> str | None:
    """Return the GPU that the runs in *folder* are of."""
    first = next(iter(sorted(folder.glob("*/run.json"))), None)
    return None if first is None else RunFolder(first.parent).facts.device.name


def measured(name: str, options: list[str], runs: Path) -> dict[str, Any]:
    """Run one case and return what a decode step and a token cost."""
    folder = runs / name.replace(",", "").replace(" ", "-")
    command = [sys.executable, "-m", "llmkern.trace", *options, "--annotate-only", "--quiet", "--force"]
    done = subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        return case(name, {"options": options}, {}, False, done.stderr.strip()[-500:])
    run = RunFolder(folder)
    return told_of(name, options, run, f"code of {commit()}; {run.facts.options.repeats} windows")


def named(run: RunFolder) -> str:
    """Return the name of the case that *run* is."""
    options = run.facts.options
    model = run.facts.model.name if run.facts.model is not None else options.model
    return f"{model} {options.precision} {options.engine}, batch {options.batch}"


def told_of(name: str, options: list[str], run: RunFolder, note: str = "") -> dict[str, Any]:
    """Return the case *name* as *run* measured it."""
    attribution = attribute(run)
    weighed = attribution.weighed
    if weighed is None or "decode" not in weighed.phases:
        return case(name, {"options": options}, {}, False, "decode cannot be told from zero")
    found = _metrics(run, weighed)
    account = attribution.accounts.get("decode")
    if account is not None:
        # Of a run whose kernels were recorded as well.
        batch = run.facts.options.batch
        found["launches"] = metric(account.launches, "1")
        by_kind = attribution.split("decode", ["kind"]).set_index("kind")["duration_ns"] / 1e9
        for group, kinds in GROUPS.items():
            found[f"time_{group}"] = metric(float(by_kind.reindex(kinds).sum()), "s")
        told = [kind for kinds in GROUPS.values() for kind in kinds]
        found["time_others"] = metric(float(by_kind[~by_kind.index.isin(told)].sum()), "s")
        found["time_gaps"] = metric(account.gap_s, "s")
        for part, joules in (("kernels", account.kernel_j), ("gaps", account.gap_j)):
            if joules is not None:
                found[f"token_energy_{part}"] = metric(joules.scaled(1 / batch), "J")
    return case(name, {"options": options}, found, True, note)


def _metrics(run: RunFolder, weighed: Any) -> dict[str, Any]:
    batch, decode = run.facts.options.batch, weighed.phases["decode"]
    found = {"step": metric(decode.latency_s, "s"), "prefill": metric(weighed.phases["prefill"].latency_s, "s")}
    read = bytes_of_step(run)
    found |= {"read": metric(read, "B"), "read_rate": metric(decode.latency_s.map(lambda s: read / s), "B/s")}
    energy, floor = decode.energy_j, weighed.floor_of("decode")
    if energy is not None:
        found |= {"step_energy": metric(energy, "J"), "token_energy": metric(energy.scaled(1 / batch), "J")}
        prefill = weighed.phases["prefill"].energy_j
        if prefill is not None:
            found["prefill_energy"] = metric(prefill, "J")
    if floor is not None:
        least_s = read / READ_BYTES_PER_S
        least: Estimate = floor.map(lambda watts: (read * J_PER_BYTE + watts * least_s) / batch)
        found |= {"least_step": metric(least_s, "s"), "least_token_energy": metric(least, "J")}
        longer: Estimate = decode.latency_s.with_(floor, lambda s, watts: np.maximum(0.0, s - least_s) * watts / batch)
        found["token_energy_longer"] = metric(longer, "J")
    return found


def bytes_of_step(run: RunFolder) -> float:
    """Return the bytes that a decode step has to read: all weights but the embedding's, and the context's cache."""
    facts = run.facts
    assert facts.model is not None
    config = build_config(find_model(facts.options.model))
    shape = shape_of(config, facts.model.name)
    tied = getattr(config, "tie_word_embeddings", False)
    embedding = 0 if tied else shape.vocabulary * shape.hidden * (4 if facts.options.precision == "fp32" else 2)
    context = PROMPT_TOKENS + facts.options.new_tokens / 2
    per_place = 2 * shape.layers * shape.kv_heads * shape.head_size * 2
    # Of the head its int8 codes are read, not its rows.
    shortlist = facts.options.engine == "fused" and facts.options.batch <= SHORTLIST_BATCH
    unread = shape.vocabulary * shape.hidden * 2 if shortlist else 0
    return float((facts.model.weight_bytes or 0) - embedding - unread + facts.options.batch * context * per_place)


def table(document: dict[str, Any]) -> list[str]:
    """Return the lines of docs/decode.md."""
    split = any("token_energy_gaps" in found["metrics"] for found in document["cases"])
    more = " in kernels and gaps |" if split else ""
    titles = f"| case | step, ms | J per token |{more} read rate, TB/s | least, ms and J | code |"
    rows = [titles, "|---" * (6 + split) + "|"]
    for found in document["cases"]:
        m = found["metrics"]
        if "token_energy" not in m:
            continue
        step, joules = (
            f"{e['value'] * f:.{p}f} [{e['low'] * f:.{p}f}, {e['high'] * f:.{p}f}]"
            for e, f, p in ((m["step"], 1e3, 2), (m["token_energy"], 1.0, 2 if m["token_energy"]["value"] > 1 else 3))
        )
        code = _code(found)
        least = f"{m['least_step']['value'] * 1e3:.2f} and {m['least_token_energy']['value']:.3f}"
        if split:
            parts = [f"{m[k]['value']:.2f}" if k in m else "–" for k in ("token_energy_kernels", "token_energy_gaps")]
            joules += f" | {' and '.join(parts)}" if parts != ["–"] * 2 else " | –"
        rows.append(
            f"| {found['name']} | {step} | {joules} | {m['read_rate']['value'] / 1e12:.2f} | {least} | {code} |"
        )
    return rows + _of_steps(document)


def _code(found: dict[str, Any]) -> str:
    """Return the commit whose code made the run of a case."""
    return str(found["note"]).partition("code of ")[2].partition(";")[0] or "–"


def saving(document: dict[str, Any]) -> list[str]:
    """Return the lines of the README: a token of qwen-7b at batch 1, eager and fused."""
    cases = {found["name"]: found["metrics"] for found in document["cases"]}
    codes = {found["name"]: _code(found) for found in document["cases"]}
    # Cases are taken over from runs at different times; the caption is that of the last ones.
    latest, older = codes["qwen-7b int8 fused, batch 1"], []
    rows = ["| qwen-7b, batch 1, a token | eager | `--engine fused` | least |", "|---|---|---|---|"]
    for precision in ("bf16", "int8", "int4"):
        eager, fused = (cases[f"qwen-7b {precision} {engine}, batch 1"] for engine in ("eager", "fused"))
        cells = [
            f"{m[step]['value'] * 1e3:.3g} ms, {m[joules]['value']:.3g} J"
            for m, step, joules in (
                (eager, "step", "token_energy"),
                (fused, "step", "token_energy"),
                (fused, "least_step", "least_token_energy"),
            )
        ]
        rows.append(f"| {precision} | {' | '.join(cells)} |")
        for engine in ("eager", "fused"):
            code = codes[f"qwen-7b {precision} {engine}, batch 1"]
            if code != latest:
                older.append(f"{precision} {engine}: code of {code}, another board.")
    return [*rows, "", " ".join(older)] if older else rows


def _of_steps(document: dict[str, Any]) -> list[str]:
    """Return what the steps of recorded runs consist of, and what they take above the least."""
    groups = [*GROUPS, "others", "gaps"]
    titles = [*groups, "J above the least", "idle floor while it takes longer", "all else"]
    rows = ["", f"| ms of a step | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for found in document["cases"]:
        m = found["metrics"]
        if "time_products" not in m or "token_energy_longer" not in m:
            continue
        above = m["token_energy"]["value"] - m["least_token_energy"]["value"]
        longer = m["token_energy_longer"]["value"]
        cells = [f"{m[f'time_{group}']['value'] * 1e3:.2f}" for group in groups]
        cells += [f"{joules:.2f}" for joules in (above, longer, above - longer)]
        rows.append(f"| {found['name']} | {' | '.join(cells)} |")
    return rows if len(rows) > 3 else []


if __name__ == "__main__":
    main()
