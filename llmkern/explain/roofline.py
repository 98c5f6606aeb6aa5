"""How far each operator is from its roof: the time that its bytes and FLOPs need at full speed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.split.kernel_joules import ENERGIES, grouped
from llmkern.attribute.time.operators import UNIDENTIFIED
from llmkern.runfolder.facts import DeviceFacts
from llmkern.runfolder.vocabulary import NONE

# Bandwidth of boards whose run says nothing of it: NVIDIA's data sheets.
_BYTES_PER_S = {
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
}
# Dense operations per clock and multiprocessor: NVIDIA's A100, Ada and H100 architecture whitepapers.
_PER_CLOCK = {
    "8.0": {"fp32": 128, "bf16": 2048, "fp16": 2048, "int8": 4096},
    "8.9": {"fp32": 256, "bf16": 1024, "fp16": 1024, "int8": 2048},
    "9.0": {"fp32": 256, "bf16": 4096, "fp16": 4096, "int8": 8192},
}
# The boost clocks that the data sheets count with: an H100 SXM of 132 multiprocessors at 1830 MHz has 989 TFLOP/s in
# bf16. Its driver allows 1980 MHz, which no product reaches within the power limit.
_SHEET_MHZ = {"8.0": 1410, "9.0": 1830}


@dataclass(frozen=True)
class Peaks:
    """What a board can do by its data sheet: bytes per second, and operations per second by dtype."""

    bytes_per_s: float
    flops: dict[str, float]


def peaks(device: DeviceFacts) -> Peaks | None:
    """Return the peaks of the *device* of a run's facts, None where its bandwidth is not known."""
    bandwidth = device.memory_bytes_per_s or _BYTES_PER_S.get(device.name)
    if not bandwidth:
        return None
    clock_mhz, multiprocessors = device.sm_clock_max_mhz, device.multiprocessors
    rates = {}
    if clock_mhz and multiprocessors:
        capability = str(device.compute_capability)
        per_clock = _PER_CLOCK.get(capability, {})
        clock_mhz = min(clock_mhz, _SHEET_MHZ.get(capability, clock_mhz))
        rates = {dtype: count * multiprocessors * clock_mhz * 1e6 for dtype, count in per_clock.items()}
    return Peaks(float(bandwidth), rates)


def roofline(attribution: Attribution, phase: str) -> pd.DataFrame:
    """Return the identified operators of one unit of *phase* against their roof, the largest waste first.

    Columns: op, module, signature, kind (of its longest kernel), calls, kernels (launched), duration_ns, moved_bytes,
    flops, bytes_per_s, flops_per_s, bound (memory or compute), floor_ns (moved_bytes at full bandwidth or flops at full
    rate, whichever is longer), roof_share (floor_ns / duration_ns; over 1 where the data came from L2), the energies of
    KernelJoules.split, floor_energy_j and waste_j. At its roof a kernel would still spend its dynamic joules:
    floor_energy_j = dynamic_j + floor power x floor_ns, so that waste_j, what is above it, is a lower bound. Empty on a
    device of unknown peaks or without pass *inspect*.
    """
    return attribution.once(("roofline", phase), lambda: _roofline(attribution, phase))


def _roofline(attribution: Attribution, phase: str) -> pd.DataFrame:
    limits = peaks(attribution.run.facts.device)
    if limits is None or attribution.identified is None or phase not in attribution.accounts:
        return pd.DataFrame(columns=_COLUMNS)
    account = attribution.accounts[phase]
    rows = attribution.kernels_of(phase)
    keys = ["op", "module", "signature"]
    frame = attribution.split(phase, keys).rename(columns={"launches": "kernels"})
    _, group = grouped(rows, keys)
    index, calls = rows["op_index"].to_numpy(int), rows["calls"].to_numpy(float)
    calls = np.where(index == NONE, 0.0, calls)
    frame["calls"] = np.bincount(group, calls, len(frame))
    for column in ("moved_bytes", "flops"):
        # An index of NONE takes any operator's, times no calls.
        per_call = np.nan_to_num(attribution.ops[column].to_numpy(float))
        frame[column] = np.bincount(group, per_call[index] * calls, len(frame))
    # In each group the first of the longest, which is the last one written.
    order = np.argsort(-rows["duration_ns"].to_numpy(), kind="stable")[::-1]
    longest = np.empty(len(frame), np.int64)
    longest[group[order]] = order
    for column in ("kind", "dtypes"):
        frame[column] = rows[column].array.take(longest).astype(object)
    frame = frame[frame["op"] != UNIDENTIFIED]
    # What a CUDA graph of the model's own moves and computes is not known.
    frame = frame[(frame["moved_bytes"] > 0) | (frame["flops"] > 0)]
    seconds = frame["duration_ns"] / 1e9
    # Of no rows at all pandas makes texts.
    rate = frame["dtypes"].map(lambda text: limits.flops.get(_compute_dtype(str(text)), np.inf)).astype(float)
    by_bytes_s, by_flops_s = frame["moved_bytes"] / limits.bytes_per_s, frame["flops"] / rate
    floor_s = np.maximum(by_bytes_s, by_flops_s)
    frame = frame.assign(
        bytes_per_s=frame["moved_bytes"] / seconds,
        flops_per_s=frame["flops"] / seconds,
        bound=np.where(by_flops_s > by_bytes_s, "compute", "memory"),
        floor_ns=floor_s * 1e9,
        roof_share=floor_s / seconds,
        floor_energy_j=np.nan,
        waste_j=np.nan,
    )
    if account.floor_w is not None and account.joules is not None:
        above_s = np.maximum(0.0, seconds - floor_s)
        waste_j = account.floor_w.value * above_s
        frame = frame.assign(waste_j=waste_j, floor_energy_j=frame["energy_j"] - waste_j)
    return frame.sort_values(["waste_j", "duration_ns"], ascending=False, ignore_index=True)[_COLUMNS]


_COLUMNS = [
    *("op", "module", "signature", "kind", "calls", "kernels", "duration_ns", "moved_bytes", "flops", "bytes_per_s"),
    *("flops_per_s", "bound", "floor_ns", "roof_share", *ENERGIES, "floor_energy_j", "waste_j"),
]


def _compute_dtype(dtypes: str) -> str:
    """Return the dtype in which an operator with arguments of *dtypes* multiplies."""
    words = [word for word in dtypes.split() if word != "to"]
    # 8-bit weights are multiplied as they are, 4-bit ones (packed in uint8) in the dtype of the activations.
    if "int8" in words:
        return "int8"
    return next((word for word in words if word in ("fp32", "bf16", "fp16")), "")
