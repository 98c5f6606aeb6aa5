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

    *effective_tokens* counts each row without padding, *computed_tokens* all that the model computes.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    effective_tokens: tuple[int, ...]
    source: str

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
        text = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
        rows = []
        for row in range(batch):
            first = (seed + row * 37) % len(text)
            cycled = (text * (prompt_tokens // len(text) + 2))[first : first + prompt_tokens]
            rows.append(cycled)
        ids = torch.tensor(rows)
        source = "built-in text"
    return PromptSet(ids, torch.ones_like(ids), (prompt_tokens,) * batch, source)


Prompt = str | list[dict[str, str]]


def parse_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a JSON-lines file: texts, or lists of chat messages.

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
    expected = 'expected {"messages": [{"role": ..., "content": ...}]}, {"prompt": "..."} or a JSON string'
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}): {expected}."
        ) from error
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{path}, line {number} cannot be read ({first_line(error)}): {expected}.") from error
    if isinstance(value, dict):
        if "messages" in value and not isinstance(value["messages"], list):
            raise UsageError(f'{path}, line {number}: "messages" is no list of messages: {expected}.')
        value = value.get("messages", value.get("prompt", value.get("text")))
    if isinstance(value, str) and value:
        return value
    if (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    ):
        return value
    raise UsageError(f"{path}, line {number} holds no prompt: {expected}.")


def encode_prompts(
    prompts: list[Prompt], tokenizer: Any, vocab_size: int, batch: int, prompt_tokens: int | None
) -> PromptSet:
    """Return the first *batch* prompts as tokens (in turn if there are fewer), cut to *prompt_tokens* if given.

    Chat messages go through the model's chat template. Without a tokenizer every UTF-8 byte is a token: no download
    is needed, but there are about four times as many tokens.
    """
    chosen = [prompts[i % len(prompts)] for i in range(batch)]
    rows = [_encode(prompt, tokenizer, vocab_size)[:prompt_tokens] for prompt in chosen]
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
    if tokenizer is None:
        source += ", one token per UTF-8 byte (no tokenizer at hand)"
    return PromptSet(ids, mask, tuple(len(row) for row in rows), source)


def _encode(prompt: Prompt, tokenizer: Any, vocab_size: int) -> list[int]:
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
