"""Which operators are worth replaying, and which of their kernels alone."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from llmkern.attribute.split.kernel_classes import Launched, kernel_classes
from llmkern.attribute.time.operators import UNIDENTIFIED
from llmkern.runfolder.replays import Wanted

# Little loaded, at the full clock, and as much as it gets: towards the power cap the clock falls and a launch costs
# less. That is worth two windows for operators above this share of a phase; the others have one in between. One that
# waits for its host draws little however often it is called, and tells most when that is as often as it goes.
DUTIES, DUTY, _LARGE = (0.3, 0.9), 0.5, 0.1
# A class below this share of every phase is left to the prior.
_WORTH = 0.003
# What PyTorch's own operators launch, but for what they take from libraries.
_OWN_KERNELS = "at::native::"
# So many kernels alone take half a minute.
_MOST_ALONE = 15


def plan_replays(kernels: pd.DataFrame, launched: Launched, phases: list[str]) -> list[Wanted]:
    """Return the operators to replay, and for each class of kernels in them in which it runs alone.

    *kernels* are those of one unit of each phase (see tally_kernels). The longest kernel of an operator is what the
    others leave of the whole. A copy to the host says that an operator waits for the device: of such a one only what
    PyTorch's own operators in it launch can be captured, so what others launch too is called there.
    """
    parts = worth_replaying(kernels, phases)
    signatures = list(parts)
    rows = kernels.assign(kernel_class=kernel_classes(kernels, launched))
    shares: dict[str, float] = {}
    for phase in phases:
        own = rows[rows["phase"] == phase]
        sums = own.groupby("kernel_class", observed=True)["duration_ns"].sum() / max(
            float(own["duration_ns"].sum()), 1.0
        )
        for name, share in sums.items():
            shares[str(name)] = max(shares.get(str(name), 0.0), float(share))
    lengths = rows.groupby(["signature", "name"], observed=True, sort=False)["duration_ns"].sum()
    of_pair = {(s, n): c for s, n, c in rows[["signature", "name", "kernel_class"]].astype(str).itertuples(index=False)}
    left = set(shares)
    places: dict[str, tuple[str, str]] = {}
    asking = {s for s in signatures if any(one.name.startswith("memcpy DtoH") for one in launched.get(s, ()))}
    for signature in sorted(signatures, key=lambda s: s in asking):
        names = list(dict.fromkeys(launch.name for launch in launched.get(signature, ())))
        ours = {name: float(lengths.get((signature, name), 0.0)) for name in names}
        if len(names) < 2:
            # One kernel is the operator.
            left -= {of_pair[signature, name] for name in names if len(names) < 2 and (signature, name) in of_pair}
            continue
        if signature in asking:
            possible = [name for name in names if _OWN_KERNELS in name]
        else:
            possible = sorted(names, key=lambda n: -ours[n])[1:]
        for name in possible:
            found = of_pair.get((signature, name), "")
            if found in left and shares[found] >= _WORTH and not name.startswith(("memcpy", "memset")):
                left.discard(found)
                places[found] = (signature, name)
    chosen = sorted(places, key=lambda c: -shares[c])[:_MOST_ALONE]
    return [
        Wanted(
            signature,
            launched.get(signature, ()),
            DUTIES[1:] if signature in asking else DUTIES if parts[signature] >= _LARGE else (DUTY,),
            tuple(name for found in chosen for of, name in [places[found]] if of == signature),
        )
        for signature in signatures
    ]


def without(wanted: list[Wanted], cached: Collection[tuple[str, str | None]]) -> list[Wanted]:
    """Return what is left of *wanted* when (signature, kernel) are *cached*; None is the whole operator."""
    rest = [
        Wanted(
            one.signature,
            one.launched,
            () if (one.signature, None) in cached else one.duties,
            tuple(name for name in one.alone if (one.signature, name) not in cached),
        )
        for one in wanted
    ]
    return [one for one in rest if one.duties or one.alone]


def worth_replaying(kernels: pd.DataFrame, phases: list[str], share: float = 0.985, most: int = 22) -> dict[str, float]:
    """Return the signatures that make up *share* of the kernels' time of each phase, the longest *most* of them.

    With each comes its largest share of a phase.
    """
    longest: dict[str, float] = {}
    for phase in phases:
        rows = kernels[kernels["phase"] == phase].groupby("signature", observed=True)["duration_ns"].sum()
        rows = rows.set_axis(rows.index.astype(object)).sort_index()
        parts = rows.drop(index=UNIDENTIFIED, errors="ignore").sort_values(ascending=False, kind="stable")
        parts = parts / max(float(rows.sum()), 1.0)
        # One more than reaches the share.
        for name, part in parts[parts.cumsum().shift(fill_value=0.0) < share].items():
            longest[str(name)] = max(longest.get(str(name), 0.0), float(part))
    return dict(sorted(longest.items(), key=lambda item: -item[1])[:most])
