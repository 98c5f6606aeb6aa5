"""Which kernels cost the same wherever they run: those of one name, grid and block that take equally long."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pandas as pd

from llmkern.attribute.time.operators import UNIDENTIFIED, Inspected
from llmkern.runfolder.replays import Launch
from llmkern.runfolder.vocabulary import NONE

# Kernels of one name, grid and block that differ by more than this work on different data: K of a product, say, is in
# neither.
_ALIKE = 1.25


# What one call of each operator signature launches, in order.
Launched = Mapping[str, tuple[Launch, ...]]


def launched_by(inspected: Inspected | None, ops: pd.DataFrame) -> dict[str, tuple[Launch, ...]]:
    """Return what one call of each operator signature in *ops* (see operators) launched when it was *inspected*.

    Calls of one signature may differ (alignment chooses the kernel): then it is what most of them did.
    """
    if inspected is None:
        return {}
    rows = inspected.kernels
    signature = ops["signature"].cat
    # Asked of a column one by one, codes and categories are a new object each time.
    codes, texts = signature.codes.to_numpy(), signature.categories.astype(str).tolist()
    launch, kinds = _numbered(rows[_LAUNCH])
    seen: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
    op = rows["op"].to_numpy()
    known = op != NONE
    op, launch = op[known], launch[known]
    # One call's kernels stand together: no operator is called within another.
    edges = np.flatnonzero(np.diff(op, prepend=NONE - 1, append=NONE - 1))
    for begin, end in pairwise(edges.tolist()):
        seen[int(codes[op[begin]])][tuple(launch[begin:end].tolist())] += 1
    every = [
        Launch(str(inspected.categories[kind[0]]), tuple(kind[1:4].tolist()), tuple(kind[4:7].tolist()))
        for kind in kinds
    ]
    return {texts[code]: tuple(every[i] for i in counter.most_common(1)[0][0]) for code, counter in seen.items()}


def _numbered(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the different ones each of *rows* is, and these, all of integers."""
    code = np.zeros(len(rows), np.int64)
    for column in rows.columns:
        # Numbers of pairs of numbers of the columns before: a few hundred, so that nothing overflows.
        number, _ = pd.factorize(rows[column].to_numpy())
        code, _ = pd.factorize(code * (int(number.max(initial=0)) + 1) + number)
    _, first = np.unique(code, return_index=True)
    return code, rows.to_numpy()[first]


_LAUNCH = ["name", "grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z"]


def kernel_classes(kernels: pd.DataFrame, launched: Launched) -> pd.Categorical:
    """Return the class of each of *kernels* (signature, name, launches, duration_ns: see tally_kernels).

    A class is named by its kernel, grid and block (by its operator without these), and numbered where there are several
    of different length. Where no operator is known, the name is all there is.
    """
    pairs = kernels.groupby(["signature", "name"], observed=True, sort=False)[["launches", "duration_ns"]].sum()
    found: dict[tuple[str, str], str] = {}
    alike: dict[str, list[tuple[float, tuple[str, str]]]] = {}
    for (signature, name), row in zip(pairs.index, pairs.to_numpy(float), strict=True):
        own = [launch for launch in launched.get(signature, ()) if launch.name == name]
        label = f"{name}{' or'.join(sorted({_shape(launch) for launch in own}))}"
        if not any(launch.blocks for launch in own) and signature not in (name, UNIDENTIFIED):
            # A copy, or an operator of the CPU: how much it does its operator knows.
            label = f"{name} in {signature}"
        alike.setdefault(label, []).append((row[1] / max(row[0], 1e-9), (signature, name)))
    for label, members in alike.items():
        number, shortest = 0, 0.0
        for length, pair in sorted(members):
            if length > _ALIKE * shortest:
                number, shortest = number + 1, length
            found[pair] = label if number == 1 else f"{label} #{number}"
    codes, texts = pd.factorize(pd.Series(found))
    of_pair = dict(zip(found, codes, strict=True))
    signatures, names = (kernels[c].astype("category").cat for c in ("signature", "name"))
    table = np.full((len(signatures.categories), len(names.categories)), NONE)
    for (signature, name), code in of_pair.items():
        table[signatures.categories.get_loc(signature), names.categories.get_loc(name)] = code
    return pd.Categorical.from_codes(table[signatures.codes, names.codes], categories=pd.Index(texts, dtype=object))


def _shape(launch: Launch) -> str:
    if not launch.blocks:
        return ""
    return f" {'x'.join(map(str, launch.grid))} of {'x'.join(map(str, launch.block))}"
