"""Prompts: a built-in deterministic set of exact lengths, or a file of chat messages and texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkern.errors import UsageError
from llmkern.workload.models import first_line

# The prompt lengths of the study, in tokens.
STUDY_LENGTHS = (200, 500, 1000, 2000, 4000)
# Special tokens sit at the ends of a vocabulary; ids between these stay clear of them.
_FIRST_ID = 10
_LAST_SHARE = 0.9
# As many as --prompt-tokens takes.
MOST_TOKENS = 2**24

_TEXT = """\
A turbine hall at night is louder than by day, because the building no longer hides it. The engineer on duty walks the
gallery once an hour and writes down eleven numbers: bearing temperatures, oil pressure, the height of the water in the
forebay. Most nights the numbers say nothing new. What she listens for is the sound between them, a change of pitch that
no gauge reports until minutes later.
When the first electric street lamps were lit, the accounts of the company show that a third of the coal was burned
between midnight and five, when almost nobody was in the street. The lamps could not be switched off one by one. It took
eleven years until somebody added a clock to each of them, and the clocks paid for themselves in a single winter.
The recipe is simple and takes patience. Soak the beans overnight, change the water, and cook them slowly with an onion,
two bay leaves and a piece of smoked paprika. Salt comes at the end. Whoever hurries the fire gets beans that are soft
outside and chalky inside, and no sauce will hide it.
Rivers carry two kinds of load. What is dissolved travels at the speed of the water, what is solid travels in steps: a
pebble may lie for a century and then move a hundred metres in one night of flood. A map of a river bed is therefore a
map of its floods, not of its ordinary days.
In the archive the letters are kept in the order in which they arrived, not in the order in which they were written.
Reading them in sequence, one meets answers before their questions, condolences before the news of the death, and once a
wedding invitation two weeks after the birth of the first child.
Measure twice, the carpenter said, but with different rulers, for a wrong ruler is wrong both times.
"""


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one batch: *input_ids* and *attention_mask* are int64 tensors [batch, tokens], padded on the left.

    *effective_tokens* counts each row without padding, *computed_tokens* all that the model computes. *output_tokens*
    is how many tokens each row wants, empty where that is not known.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    effective_tokens: tuple[int, ...]
    source: str
    output_tokens: tuple[int, ...] = ()

    @property
    def computed_tokens(self) -> int:
        return self.input_ids.numel()


def builtin_prompts(batch: int, prompt_tokens: int, tokenizer: Any, vocab_size: int, seed: int) -> PromptSet:
    """Return *batch* different prompts of exactly *prompt_tokens* tokens.

    With a tokenizer they are the built-in text from a different place for each row, without one seeded token ids.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        last = max(_FIRST_ID + 1, int(vocab_size * _LAST_SHARE))
        ids = torch.randint(min(_FIRST_ID, last - 1), last, (batch, prompt_tokens), generator=generator)
        source = "seeded token ids"
    else:
        text = _builtin_text(tokenizer)
        ids = torch.tensor([_cut(text, seed + row * 37, prompt_tokens) for row in range(batch)])
        source = "built-in text"
    return PromptSet(ids, torch.ones_like(ids), (prompt_tokens,) * batch, source)


def _builtin_text(tokenizer: Any) -> list[int]:
    return list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])


def _cut(text: list[int], first: int, tokens: int) -> list[int]:
    first %= len(text)
    return (text * (tokens // len(text) + 2))[first : first + tokens]


@dataclass(frozen=True)
class Length:
    """A prompt of which only the length is given: so many *tokens* of built-in text."""

    tokens: int


Content = str | list[dict[str, str]] | Length


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file, and how many tokens its answer has (None: not said)."""

    content: Content
    output_tokens: int | None = None


def parse_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a JSON-lines file: texts, lists of chat messages, or lengths.

    Raises UsageError that names the file and the number of the broken line.
    """
    try:
        # By line feeds only: JSON may hold other separators of lines as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"prompt file {path} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"prompt file {path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_parse_line(path, number, line))
    if not prompts:
        raise UsageError(f"prompt file {path} has no prompts: write one JSON value per line.")
    return prompts


def _parse_line(path: Path, number: int, line: str) -> Prompt:
    expected = (
        'expected {"messages": [{"role": ..., "content": ...}]}, {"prompt": "..."}, {"tokens": N} or a JSON string'
    )
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}): {expected}."
        ) from error
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{path}, line {number} cannot be read ({first_line(error)}): {expected}.") from error
    output_tokens = None
    if isinstance(value, dict):
        output_tokens = _number(value, "output_tokens", f"{path}, line {number}")
        tokens = _number(value, "tokens", f"{path}, line {number}")
        if tokens is not None and not {"messages", "prompt", "text"} & value.keys():
            return Prompt(Length(tokens), output_tokens)
        if "messages" in value and not isinstance(value["messages"], list):
            raise UsageError(f'{path}, line {number}: "messages" is no list of messages: {expected}.')
        value = value.get("messages", value.get("prompt", value.get("text")))
    if isinstance(value, str) and value:
        return Prompt(value, output_tokens)
    if (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    ):
        return Prompt(value, output_tokens)
    raise UsageError(f"{path}, line {number} holds no prompt: {expected}.")


def _number(value: dict[str, Any], name: str, where: str) -> int | None:
    number = value.get(name)
    if number is not None and (type(number) is not int or not 1 <= number <= MOST_TOKENS):
        raise UsageError(f'{where}: "{name}" is {number!r}: give a whole number from 1 to {MOST_TOKENS}.')
    return number


def encode_prompts(
    prompts: list[Prompt], tokenizer: Any, vocab_size: int, batch: int, prompt_tokens: int | None, seed: int = 0
) -> PromptSet:
    """Return the first *batch* prompts as tokens (in turn if there are fewer), cut to *prompt_tokens* if given.

    Of lengths each row is another piece of the built-in text, without a tokenizer other token ids, by *seed*.

    Chat messages go through the model's chat template. Without a tokenizer every UTF-8 byte is a token: no download
    is needed, but there are about four times as many tokens.
    """
    chosen = [prompts[i % len(prompts)] for i in range(batch)]
    rows = [
        _encode(prompt.content, tokenizer, vocab_size, seed + 37 * row)[:prompt_tokens]
        for row, prompt in enumerate(chosen)
    ]
    if not all(rows):
        raise UsageError("a prompt of the file has no token: give it some text.")
    width = max(len(row) for row in rows)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    ids = torch.full((batch, width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    used = min(batch, len(prompts))
    source = f"{used} prompt{'s' if used > 1 else ''} from a file"
    if len(prompts) > batch:
        source = f"the first {used} of {len(prompts)} prompts from a file (--batch {batch})"
    if len(prompts) < batch:
        source += f", in turn to fill a batch of {batch}"
    if tokenizer is None and not all(isinstance(prompt.content, Length) for prompt in chosen):
        source += ", one token per UTF-8 byte (no tokenizer at hand)"
    wanted = [prompt.output_tokens for prompt in chosen]
    outputs = tuple(n for n in wanted if n is not None)
    return PromptSet(ids, mask, tuple(map(len, rows)), source, outputs if len(outputs) == batch else ())


def _encode(prompt: Content, tokenizer: Any, vocab_size: int, seed: int) -> list[int]:
    if isinstance(prompt, Length):
        if tokenizer is not None:
            return _cut(_builtin_text(tokenizer), seed, prompt.tokens)
        ids: list[int] = builtin_prompts(1, prompt.tokens, None, vocab_size, seed).input_ids[0].tolist()
        return ids
    if tokenizer is None:
        text = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        offset = _FIRST_ID if vocab_size > 256 + _FIRST_ID else 0
        return [(byte + offset) % vocab_size for byte in text.encode("utf-8", "surrogatepass")]
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the prompt file has chat messages, but the model's tokenizer has no chat template: "
            'use {"prompt": "..."} lines, or an instruct model.'
        )
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def encode_set(
    prompts: list[Prompt], tokenizer: Any, vocab_size: int, batch: int, seed: int = 0
) -> tuple[PromptSet, ...]:
    """Return all prompts in batches of *batch*; raises UsageError where the last one would not be full."""
    if len(prompts) % batch:
        raise UsageError(
            f"{len(prompts)} prompts are no whole number of batches of {batch}: give a multiple of it, so that none "
            "counts twice."
        )
    return tuple(
        encode_prompts(prompts[first : first + batch], tokenizer, vocab_size, batch, None, seed + first)
        for first in range(0, len(prompts), batch)
    )
