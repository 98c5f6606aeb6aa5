"""Numbers and names as the reports write them."""

from __future__ import annotations

import math
import re
import unicodedata

from llmkern.estimate import Estimate

_SCALES: dict[str, list[tuple[float, str]]] = {
    "s": [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")],
    "J": [(1e3, "kJ"), (1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ")],
    "W": [(1.0, "W")],
    "B": [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")],
}


def quantity(value: float | None, unit: str) -> str:
    """Return *value* (in s, J, W or B) with three significant digits and a fitting prefix; – when absent."""
    if value is None or value != value:
        return "–"
    if abs(value) < (1e-10 if unit == "s" else 1e-9):
        return f"0 {unit}"
    factor, name = _scale(value, unit)
    return f"{_digits(value / factor)} {name}"


def duration(seconds: float) -> str:
    """Return a length of time as people plan with it: in s, min or h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def with_interval(estimate: Estimate | None, unit: str) -> str:
    """Return an estimate as value [low, high], in one unit and with the digits that its interval leaves room for."""
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None or math.isnan(estimate.low) or math.isnan(estimate.high):
        return quantity(estimate.value, unit)
    ends = (estimate.value, estimate.low, estimate.high)
    factor, name = _scale(max(map(abs, ends)), unit)
    # As many decimals as the largest has with three digits, or as the first digit of the interval needs.
    places = len(_digits(max(map(abs, ends)) / factor).partition(".")[2])
    width = (estimate.high - estimate.low) / 2 / factor
    if width > 0:
        places = min(4, max(places, -math.floor(math.log10(width))))
    value, low, high = (_plain_zero(f"{end / factor:,.{places}f}") for end in ends)
    return f"{value} [{low}, {high}] {name}"


def percent(share: float, places: int = 0) -> str:
    """Return *share* in percent with *places* decimals, never as minus zero."""
    return f"{_plain_zero(f'{share * 100:.{places}f}')}%"


def signed(share: Estimate) -> str:
    """Return a *share* by which something differs in percent, with its interval where it has one."""
    if share.low is None or share.high is None:
        return f"{share.value:+.1%}"
    return f"{share.value:+.1%} [{share.low:+.1%}, {share.high:+.1%}]"


def _plain_zero(text: str) -> str:
    return text.removeprefix("-") if not text.strip("-0.,") else text


def visible(text: str) -> str:
    """Return *text* with control characters (but for line ends) as symbols, so that they steer no terminal."""
    if text.isprintable():
        return text
    return "".join(_symbol(c) if c != "\n" and unicodedata.category(c) in ("Cc", "Cf") else c for c in text)


def _symbol(character: str) -> str:
    code = ord(character)
    # The block of control pictures has one for each of ASCII.
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"<U+{code:04X}>"


def elided(text: str, width: int) -> str:
    """Return *text* cut to *width* characters in its middle: what tells names apart is at their ends."""
    if len(text) <= width:
        return text
    tail = (2 * (width - 1)) // 3
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}" if width > 1 else text[:width]


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


# Wrappers that every elementwise kernel of PyTorch has, and that say nothing of what it does.
_WRAPPERS = {"AUnaryFunctor", "BUnaryFunctor", "BinaryFunctor", "ReduceOp", "OpaqueType", "OpType"}
_TYPES = {
    "float": "fp32",
    "double": "fp64",
    "c10::BFloat16": "bf16",
    "__nv_bfloat16": "bf16",
    "c10::Half": "fp16",
    "__half": "fp16",
    "signed char": "int8",
    "unsigned char": "uint8",
    "int": "int32",
    "long": "int64",
    "bool": "bool",
}
_FUNCTOR = re.compile(r"\b(\w*(?:Functor|functor|Ops?|_op)\w*)\b(?:<([\w: ]+)[,>])?")
_FUNCTION = re.compile(r"\b(\w+)(?:<[^<>()]*>)?\(at::Tensor")
_LAMBDA = re.compile(r"\{lambda\(([\w: ]+)[,)]")


def short_name(name: str) -> str:
    """Return a demangled kernel name without return type, namespaces of libraries, arguments and template arguments.

    Of the template arguments the one that says what is computed is kept, with its element type: without it every
    elementwise kernel of PyTorch and every CUTLASS kernel would have the same name.
    """
    if "(" not in name.replace("(anonymous namespace)", "") or name.startswith("memcpy "):
        return name
    plain = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    outside = _without_templates(plain).split("(")[0].strip()
    head = "::".join(outside.split("::")[-2:]).removeprefix("native::")
    inside = plain[plain.find("<") + 1 :] if "<" in plain else ""
    if head == "cutlass::Kernel2":
        return inside.partition(">")[0]
    detail = _detail(inside)
    return f"{head}<{detail}>" if detail and detail not in head else head


def gap_name(before: str, after: str) -> str:
    """Return the kernels around a gap; of an elementwise kernel only what it computes."""

    def tight(name: str) -> str:
        return re.sub(r"^\w*elementwise_kernel<(.+)>$", r"\1", short_name(name))

    return f"{tight(before)} → {tight(after)}"


def _detail(templates: str) -> str:
    """Return the function object or function among *templates* that does the work, and on which type."""
    functors = [m for m in _FUNCTOR.finditer(templates) if m[1] not in _WRAPPERS]
    function = _FUNCTION.search(templates)
    if functors and (function is None or functors[0].start() < function.start()):
        element = _TYPES.get(functors[0][2] or "", "")
        return f"{functors[0][1]} {element}".strip()
    if function is None:
        return ""
    argument = _LAMBDA.search(templates)
    return f"{function[1]} {_TYPES.get(argument[1], '') if argument else ''}".strip()


def _without_templates(name: str) -> str:
    depth = 0
    outside = []
    for character in name:
        if character == "<":
            depth += 1
        elif character == ">":
            depth = max(0, depth - 1)
        elif depth == 0:
            outside.append(character)
    return "".join(outside)
