"""The prompts of a batch: by a seeded distribution, a file or a data set; random or in buckets of like length."""

from __future__ import annotations

import json
import math
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkern.errors import UsageError
from llmkern.study.plan import Configuration, Lengths, Prompts, Source

# A draw that leaves the limits is drawn again; so often at most, then it is the limit that it left.
_MOST_DRAWS = 1000


def drawn(lengths: Lengths, count: int, generator: random.Random) -> list[int]:
    """Return *count* whole numbers of tokens of the distribution *lengths*."""
    found = []
    for _ in range(count):
        for _ in range(_MOST_DRAWS):
            value = round(math.exp(generator.gauss(math.log(lengths.median), lengths.sigma)))
            if lengths.low <= value <= lengths.high:
                break
        found.append(min(max(value, lengths.low), lengths.high))
    return found


def pool(prompts: Prompts, where: str, folder: Path) -> list[dict[str, Any]]:
    """Return all prompts of a set as lines of a prompt file; raises UsageError for a source that cannot be had."""
    generator = random.Random(prompts.seed)
    if prompts.lengths is not None:
        lines = [{"tokens": n} for n in drawn(prompts.lengths, prompts.pool, generator)]
    elif prompts.file is not None:
        lines = _of_file(folder / prompts.file)
    else:
        lines = _of_dataset(prompts, where)
    assert prompts.outputs is not None
    answers = drawn(prompts.outputs, len(lines), generator)
    lines = [{"output_tokens": answer, **line} for line, answer in zip(lines, answers, strict=True)]
    generator.shuffle(lines)
    return lines[: prompts.pool]


def laid(lines: list[dict[str, Any]], prompts: Prompts) -> list[dict[str, Any]]:
    """Return *lines* in the order of the set *prompts*."""
    return sorted(lines, key=_size) if prompts.order == "sorted" else lines


def batch_of(lines: list[dict[str, Any]], batch: int, draw: int, draws: int) -> list[dict[str, Any]]:
    """Return the prompts of draw number *draw* (from 0) of *draws*: batches that lie evenly over the pool.

    With one draw it is the batch in the middle; a pool that is smaller than a batch is gone through again.
    """
    if len(lines) < batch:
        return [lines[i % len(lines)] for i in range(batch)]
    batches = len(lines) // batch
    place = min(batches - 1, int((draw + 0.5) / draws * batches))
    return lines[place * batch : (place + 1) * batch]


@dataclass(frozen=True)
class Written:
    """The prompts of a run: the file of its batch, that of its prompt set (None: the batch is all of it), tokens."""

    file: Path
    longest: int
    answers: int
    prompt_set: Path | None = None


def write_prompts(source: Source, one: Configuration, folder: Path) -> Written:
    """Write the prompts of a run into *folder* and return them; raises UsageError for a set that is no whole batches.

    The length of a text is not known before it is met by a tokenizer: it is taken as a token for each 4 characters.
    """
    prompts = source.plan.prompts[one.prompts]
    draws, draw = source.plan.axes.draw, source.plan.axes.draw.index(one.draw)
    lines = pool(prompts, source.at("prompts", one.prompts), source.folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = prompts.set
    if size is None or size < one.batch:
        chosen = batch_of(laid(lines, prompts), one.batch, draw, len(draws))
        whole = None
    else:
        if size % one.batch:
            where = source.at("prompts", one.prompts, "set")
            raise UsageError(
                f"{where}: a set of {size} prompts is no whole number of batches of {one.batch}: change one."
            )
        # The same prompts for every batch size: laid in order only then.
        taken = laid(batch_of(lines, size, draw, len(draws)), prompts)
        chosen = batch_of(taken, one.batch, 0, 1)
        whole = None if size == one.batch else _write(taken, folder, f"{one.prompts}-set{size}-d{one.draw}")
    # Its name says what is in it: a run of other prompts is not the same run.
    file = _write(chosen, folder, f"{one.prompts}-b{one.batch}-d{one.draw}")
    longest = max(_size(line) for line in chosen)
    return Written(file, longest, max(2, *(int(line["output_tokens"]) for line in chosen)), whole)


def _write(lines: list[dict[str, Any]], folder: Path, name: str) -> Path:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    file = folder / f"{name}-{zlib.crc32(text):08x}.jsonl"
    file.write_bytes(text)
    return file


def _size(line: dict[str, Any]) -> int:
    if "tokens" in line:
        return int(line["tokens"])
    content = line.get("prompt") or "\n".join(m["content"] for m in line["messages"])
    return max(1, len(content) // 4)


def _of_file(path: Path) -> list[dict[str, Any]]:
    from llmkern.workload.prompts import Length, parse_prompts

    found = []
    for prompt in parse_prompts(path):
        content = prompt.content
        key = "tokens" if isinstance(content, Length) else "prompt" if isinstance(content, str) else "messages"
        line: dict[str, Any] = {key: content.tokens if isinstance(content, Length) else content}
        if prompt.output_tokens is not None:
            line["output_tokens"] = prompt.output_tokens
        found.append(line)
    return found


def _of_dataset(prompts: Prompts, where: str) -> list[dict[str, Any]]:
    """Return prompts of a data set of the Hugging Face hub: a column of texts, or of lists of chat messages."""
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError as error:
        raise UsageError(f"{where}: a dataset needs a package that is not here: pip install datasets.") from error
    try:
        rows = datasets.load_dataset(prompts.dataset, split=prompts.split, streaming=True)
        first = list(rows.take(prompts.pool))
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UsageError(
            f"{where}: data set {prompts.dataset} ({prompts.split}) cannot be had ({reason}): check its name and the "
            "network, or give a file."
        ) from error
    columns = [prompts.column] if prompts.column else ["messages", "conversations", "prompt", "question", "text"]
    column = next((name for name in columns if first and name in first[0]), None)
    if column is None:
        there = ", ".join(first[0]) if first else "none"
        raise UsageError(f"{where}: {prompts.dataset} has no column {' or '.join(columns)} (it has {there}).")
    found: list[dict[str, Any]] = []
    for row in first:
        value = row[column]
        if isinstance(value, str) and value:
            found.append({"prompt": value})
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            # Up to the answer: what a user asked is the prompt.
            asked = {"role": "user", "content": str(value[0].get("content", value[0].get("value", "")))}
            if asked["content"]:
                found.append({"messages": [asked]})
    if not found:
        raise UsageError(f"{where}: column {column} of {prompts.dataset} holds neither texts nor chats.")
    return found
