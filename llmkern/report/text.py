"""Numbers and names as the reports write them."""

from __future__ import annotations

import math
import re

from llmkern.attribute.estimate import Estimate

_SCALES: dict[str, list[tuple[float, str]]] = {
    "s": [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")],
    "J": [(1e3, "kJ"), (1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ")],
    "W": [(1.0, "W")],
    "B": [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")],
}


def quantity(value: float | None, unit: str) -> str:
    """Return *value* (in s, J, W or B) with three significant digits and a fitting prefix; – when absent."""
    if value is None or value != value:
        return "–"
    if abs(value) < 1e-9:
        return f"0 {unit}"
    factor, name = _scale(value, unit)
    return f"{_digits(value / factor)} {name}"


def with_interval(estimate: Estimate | None, unit: str) -> str:
    """Return an estimate as value ± half of its 95 % interval."""
    if estimate is None:
        return "–"
    half = estimate.half_width
    if half is None:
        return quantity(estimate.value, unit)
    factor, name = _scale(estimate.value, unit)
    half /= factor
    # As many decimals as the value would have, or as the first digit of the interval needs.
    places = len(_digits(estimate.value / factor).partition(".")[2])
    if half > 0:
        places = min(4, max(places, -math.floor(math.log10(half))))
    return f"{estimate.value / factor:,.{places}f} ± {half:.{places}f} {name}"


def count(value: float) -> str:
    """Return a count per unit: whole numbers without decimals."""
    return f"{value:,.0f}" if abs(value - round(value)) < 0.005 else f"{value:,.2f}"


def _scale(value: float, unit: str) -> tuple[float, str]:
    scales = _SCALES[unit]
    return next((s for s in scales if abs(value) >= s[0]), scales[-1])


def _digits(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def short_name(name: str) -> str:
    """Return a demangled kernel name without return type, arguments and template arguments.

    The first template argument that is itself a function object is kept: without it every elementwise kernel of
    PyTorch would have the same name.
    """
    if "(" not in name.replace("(anonymous namespace)", "") or name.startswith("memcpy "):
        return name
    plain = re.sub(r"\(anonymous namespace\)::", "", name.removeprefix("void "))
    head, functors = _without_templates(plain)
    head = "::".join(head.split("(")[0].strip().split("::")[-2:])
    inner = next((f for f in functors if f not in head), None)
    return f"{head}<{inner}>" if inner else head


def _without_templates(name: str) -> tuple[str, list[str]]:
    depth = 0
    outside = []
    for character in name:
        if character == "<":
            depth += 1
        elif character == ">":
            depth = max(0, depth - 1)
        elif depth == 0:
            outside.append(character)
    functors = re.findall(r"(\w*(?:Functor|functor|Ops?|_op)\w*)\b", name[name.find("<") :] if "<" in name else "")
    return "".join(outside), functors
