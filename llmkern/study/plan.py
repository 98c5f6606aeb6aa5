"""Plans: axes as data, read from TOML, and the configurations that they make."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from llmkern.errors import UsageError
from llmkern.runfolder.vocabulary import FUSED, WEIGHTS

BUILT_IN = ("precision", "batch", "paper")
MOST_RUNS = 10_000
_MOST_BYTES = 2**20

Tokens = Annotated[int, Meta(ge=1, le=2**24)]
Precision = Literal["fp32", "bf16", "fp16", "int8", "int4", "int8-fused", "int4-fused"]
Engine = Literal["eager", "graph", "fused"]
Axis = Annotated[tuple[str, ...], Meta(min_length=1)]


class Axes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What is varied: every combination is a run; one value is enough for an axis that stays as it is."""

    model: Axis
    precision: Annotated[tuple[Precision, ...], Meta(min_length=1)] = ("bf16",)
    engine: Annotated[tuple[Engine, ...], Meta(min_length=1)] = ("eager",)
    batch: Annotated[tuple[Annotated[int, Meta(ge=1, le=65536)], ...], Meta(min_length=1)] = (1,)
    prompts: Axis = ("",)
    prompt_tokens: Annotated[tuple[Tokens, ...], Meta(min_length=1)] = (512,)
    new_tokens: Annotated[tuple[Annotated[int, Meta(ge=2, le=2**24)], ...], Meta(min_length=1)] = (32,)
    draw: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31)], ...], Meta(min_length=1)] = (0,)


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What every run has in common; see ``llmkern trace --help``.

    *record*: ``windows`` weighs latency and energy per phase, ``timeline`` records every kernel as well, ``replays``
    replays operators for the joules of each kernel.
    """

    record: Literal["windows", "timeline", "replays"] = "timeline"
    repeats: Annotated[int, Meta(ge=1, le=10**6)] | None = None
    warmup: Annotated[int, Meta(ge=1, le=10**6)] = 5
    weights: Literal["auto", "hub", "local", "random"] = "auto"
    device: str = "auto"
    outliers: Annotated[int, Meta(ge=0, le=2**24)] = 6
    double_quant: bool = False
    cudnn_attention: bool = True
    int8_threshold: Annotated[float, Meta(ge=0, le=1e9)] = 6.0
    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0


class Lengths(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A log-normal distribution of whole numbers of tokens, drawn anew where it leaves [low, high]."""

    median: Annotated[float, Meta(gt=0, le=1e6)]
    sigma: Annotated[float, Meta(ge=0, le=5)]
    low: Tokens
    high: Tokens


class Prompts(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where the prompts of a batch come from: drawn *lengths*, a *file* of JSON lines, or a *dataset* of the hub.

    *pool* of them are laid in *order* and cut into batches; a draw takes one of these. With a *set* a draw takes so
    many prompts whatever the batch is: prefill is weighed over all of them, in batches, so that no batch size has
    shorter prompts than another; and the batch in their middle is generated for.
    """

    lengths: Lengths | None = None
    outputs: Lengths | None = None
    file: str | None = None
    dataset: str | None = None
    split: str = "train"
    column: str | None = None
    pool: Annotated[int, Meta(ge=1, le=10**6)] = 512
    order: Literal["random", "sorted"] = "random"
    set: Annotated[int, Meta(ge=1, le=10**6)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0


class Plan(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """All of a plan file."""

    axes: Axes
    title: str = ""
    options: Settings = Settings()
    prompts: dict[str, Prompts] = {}
    # Combinations that are left out: those that have all of an entry's values.
    exclude: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Configuration:
    """One run of a plan; *prompts* names a set of prompts, or is empty for *prompt_tokens* of built-in text."""

    model: str
    precision: str
    engine: str
    batch: int
    prompts: str
    prompt_tokens: int
    new_tokens: int
    draw: int

    @property
    def name(self) -> str:
        """Return the name of its run folder, which says all of it."""
        model = re.sub(r"[^\w.-]+", "_", self.model).strip("_.") or "model"
        engine = [] if self.engine == "eager" else [self.engine]
        prompts = self.prompts or f"p{self.prompt_tokens}-n{self.new_tokens}"
        return "-".join([model, self.precision, *engine, f"b{self.batch}", prompts, f"d{self.draw}"])


@dataclass(frozen=True)
class Source:
    """A plan and the text that it came from, so that what is wrong with it can be shown there."""

    plan: Plan
    text: str
    name: str
    folder: Path

    def at(self, *keys: str, value: Any = None) -> str:
        """Return ``FILE, line N`` of a key, or of *value* in its list; of the file where it is not in there."""
        line = line_of(self.text, keys, value)
        return f"{self.name}, line {line}" if line else self.name

    def configurations(self) -> list[Configuration]:
        """Return every run of the plan; raises UsageError for a plan that makes none, too many, or the same twice."""
        axes = self.plan.axes
        total = 1
        for axis in axes.__struct_fields__:
            values = getattr(axes, axis)
            total *= len(values)
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise UsageError(f"{self.at('axes', axis, value=twice)}: {axis} has {twice!r} twice: leave one out.")
        if total > MOST_RUNS:
            raise UsageError(
                f"{self.at('axes')}: these axes make {total:,} runs, at most {MOST_RUNS:,} are possible: shorten one."
            )
        found: dict[Configuration, None] = {}
        for values in itertools.product(*(getattr(axes, axis) for axis in axes.__struct_fields__)):
            one = dict(zip(axes.__struct_fields__, values, strict=True))
            if any(all(one.get(key) == value for key, value in left.items()) for left in self.plan.exclude):
                continue
            if one["precision"] in FUSED:
                one |= {"precision": FUSED[one["precision"]], "engine": "fused"}
            if one["prompts"]:
                # Lengths are those of the prompts.
                one |= {"prompt_tokens": 0, "new_tokens": 0}
            found[Configuration(**one)] = None
        if not found:
            raise UsageError(f"{self.at('exclude')}: nothing is left of the plan: exclude less.")
        same, times = Counter(one.name for one in found).most_common(1)[0]
        if times > 1:
            raise UsageError(f"{self.name}: two runs would be called {same}: give models and prompts clearer names.")
        return list(found)


def read_plan(which: str, changed: dict[str, list[Any]], options: dict[str, Any]) -> Source:
    """Return a built-in plan or that of a TOML file, with axes *changed* and *options* set by the command line.

    Raises UsageError with file and line for what cannot be a plan.
    """
    text, name, folder = _text(which)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is no TOML ({error}): mend that line.") from error
    for key, changes in (("axes", changed), ("options", options)):
        if changes and isinstance(tree.setdefault(key, {}), dict):
            tree[key] |= changes
    try:
        plan = msgspec.convert(tree, Plan)
    except msgspec.ValidationError as error:
        raise UsageError(_sentence(str(error), tree, text, name)) from error
    source = Source(plan, text, name, folder)
    _check(source)
    return source


def _text(which: str) -> tuple[str, str, Path]:
    if which in BUILT_IN:
        file = resources.files("llmkern.study") / "plans" / f"{which}.toml"
        return file.read_text(encoding="utf-8"), f"plan {which}", Path()
    path = Path(which)
    if not path.exists():
        raise UsageError(f"there is no plan {which}: give a TOML file, or one of {', '.join(BUILT_IN)}.")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes, which is no plan: at most {_MOST_BYTES:,}.")
        return path.read_text(encoding="utf-8-sig"), str(path), path.parent
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error


_PLACE = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")


def _sentence(message: str, tree: dict[str, Any], text: str, name: str) -> str:
    """Return msgspec's *message* with the line of the file in the place of its path."""
    found, unknown = _PLACE.search(message), _UNKNOWN.search(message)
    keys = [part for part in re.split(r"[.\[\]]+", found[1] if found else "") if part]
    numbers = [int(part) for part in keys if part.isdigit()]
    keys = [part for part in keys if not part.isdigit() and part != "..."]
    told = message[: found.start()] if found else message
    if unknown:
        known = _fields(keys)
        told = f"{unknown[1]!r} is unknown there" + (f"; known are {', '.join(known)}" if known else "")
        keys.append(unknown[1])
    value = None
    if numbers and not unknown:
        with_values: Any = tree
        for key in keys:
            with_values = with_values.get(key, {}) if isinstance(with_values, dict) else {}
        if isinstance(with_values, list) and numbers[0] < len(with_values):
            value = with_values[numbers[0]]
            told = f"{keys[-1]} has {value!r}: {told[:1].lower()}{told[1:]}"
    elif keys and not unknown:
        told = f"{keys[-1]}: {told[:1].lower()}{told[1:]}"
    values = next((_VALUES[key] for key in reversed(keys) if key in _VALUES), None)
    if values and "enum" in told:
        told += f"; known are {', '.join(values)}"
    line = line_of(text, tuple(keys), value)
    return f"{name}{f', line {line}' if line else ''}: {told}."


_VALUES: dict[str, tuple[str, ...]] = {
    "precision": get_args(Precision),
    "engine": get_args(Engine),
    "record": ("windows", "timeline", "replays"),
    "weights": WEIGHTS,
    "order": ("random", "sorted"),
}


def _fields(keys: list[str]) -> tuple[str, ...]:
    kinds: dict[str, Any] = {"axes": Axes, "options": Settings, "prompts": Prompts}
    kind = Plan if not keys else kinds.get(keys[0])
    if len(keys) > 1 and keys[-1] in ("lengths", "outputs"):
        kind = Lengths
    return () if kind is None else kind.__struct_fields__


def line_of(text: str, keys: tuple[str, ...], value: Any = None) -> int | None:
    """Return the number of the line of TOML *text* in which *keys* are given, or *value* in the list there.

    What is not written there is shown at the nearest key above it.
    """
    places: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        header = re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line)
        pair = re.match(r"\s*([\w.\"'-]+)\s*=", line)
        if header and not pair:
            table = _parts(header[1])
            places.setdefault(table, number)
        elif pair:
            places.setdefault((*table, *_parts(pair[1])), number)
    while keys and keys not in places:
        keys = keys[:-1]
    if not keys:
        return None
    first = places[keys]
    if value is not None:
        told = re.escape(str(value))
        for number in range(first, len(lines) + 1):
            line = lines[number - 1].partition("=")[2] if number == first else lines[number - 1]
            if re.search(rf"(?<![\w.-]){told}(?![\w.-])", line):
                return number
            if "]" in line:
                break
        # Said on the command line.
        return None
    return first


def _parts(key: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in key.split("."))


def _check(source: Source) -> None:
    """Refuse what types cannot: names without a set, sets without a source, exclusions of what is no axis."""
    plan = source.plan
    for left in plan.exclude:
        unknown = next((str(key) for key in left if key not in Axes.__struct_fields__), None)
        if unknown is not None or not left:
            raise UsageError(
                f"{source.at('exclude')}: {unknown!r} is no axis; known are {', '.join(Axes.__struct_fields__)}."
            )
    for name in plan.axes.prompts:
        if name and name not in plan.prompts:
            known = ", ".join(plan.prompts) or "none"
            raise UsageError(
                f"{source.at('axes', 'prompts', value=name)}: there are no prompts called {name!r} (there are: "
                f"{known}): describe them in [prompts.{name}]."
            )
    for name, prompts in plan.prompts.items():
        where = source.at("prompts", name)
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            raise UsageError(f"{where}: {name!r} names files: use letters, digits, '.', '_' and '-', at most 64.")
        given = [kind for kind in ("lengths", "file", "dataset") if getattr(prompts, kind) is not None]
        if len(given) != 1:
            told = " and ".join(given) or "no source"
            raise UsageError(f"{where} has {told}: give one of lengths, file and dataset.")
        for kind in ("lengths", "outputs"):
            lengths = getattr(prompts, kind)
            if lengths is not None and not lengths.low <= lengths.median <= lengths.high:
                raise UsageError(
                    f"{source.at('prompts', name, kind)}: {kind} have a median of {lengths.median:g}, which is not "
                    f"between low = {lengths.low} and high = {lengths.high}."
                )
        if prompts.outputs is None:
            raise UsageError(f"{where} has no outputs: say how long answers are, for example {_OUTPUTS}.")


_OUTPUTS = "outputs = { median = 90, sigma = 0.8, low = 10, high = 300 }"
