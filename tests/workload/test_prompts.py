"""Prompts: exact lengths, padding on the left, chat templates, and files with mistakes in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmkern.errors import UsageError
from llmkern.workload.prompts import (
    STUDY_LENGTHS,
    Content,
    Length,
    Prompt,
    PromptSet,
    builtin_prompts,
    encode_prompts,
    parse_prompts,
)


def encoded(contents: list[Content], *rest: Any) -> PromptSet:
    return encode_prompts([Prompt(content) for content in contents], *rest)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    words = ["<pad>", "<unk>", "<", ">", "user", "system", "go", "hello", "world", "be", "brief"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("length", STUDY_LENGTHS)
def test_the_built_in_prompts_have_the_studys_lengths(length: int, tokenizer: Any) -> None:
    for made in (builtin_prompts(3, length, None, 4096, 0), builtin_prompts(3, length, tokenizer, 4096, 0)):
        assert made.input_ids.shape == (3, length)
        assert made.effective_tokens == (length,) * 3
        assert made.computed_tokens == 3 * length
        assert made.attention_mask.all()


def test_seeds_decide_and_rows_differ() -> None:
    one, again, other = (builtin_prompts(2, 50, None, 4096, s).input_ids for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


def test_short_prompts_are_padded_on_the_left_and_not_counted(tokenizer: Any) -> None:
    made = encoded(["hello", "hello world hello"], tokenizer, 100, 2, None)
    assert made.input_ids.tolist() == [[0, 0, 7], [7, 8, 7]]
    assert made.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert made.effective_tokens == (1, 3)
    assert made.computed_tokens == 6


def test_fewer_prompts_than_the_batch_are_taken_in_turn_and_said_so(tokenizer: Any) -> None:
    made = encoded(["hello", "world"], tokenizer, 100, 3, None)
    assert made.input_ids.tolist() == [[7], [8], [7]]
    assert "in turn" in made.source


def test_chat_messages_go_through_the_template(tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    made = encoded([chat], tokenizer, 100, 1, None)
    assert tokenizer.decode(made.input_ids[0]).split() == [
        "<",
        "system",
        ">",
        "be",
        "brief",
        "<",
        "user",
        ">",
        "hello",
        "<",
        "go",
        ">",
    ]


def test_chat_messages_without_a_template_are_a_sentence(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match=r"no chat template.*prompt"):
        encoded([[{"role": "user", "content": "hello"}]], tokenizer, 100, 1, None)


def test_without_a_tokenizer_bytes_are_tokens_within_the_vocabulary() -> None:
    made = encoded(["grüß"], None, 4096, 1, None)
    assert made.effective_tokens == (6,)
    assert int(made.input_ids.max()) < 4096
    assert "UTF-8 byte" in made.source


def test_prompts_are_cut_to_the_wanted_length() -> None:
    assert encoded(["x" * 100], None, 4096, 1, 40).effective_tokens == (40,)


def test_every_kind_of_line_is_read(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    chat = [{"role": "user", "content": "c"}]
    lines = [json.dumps(v) for v in ("a", {"prompt": "b"}, {"messages": chat}, {"text": "d"})]
    file.write_text("\n\n".join(lines) + "\n")
    assert [prompt.content for prompt in parse_prompts(file)] == ["a", "b", chat, "d"]


def test_lengths_alone_are_prompts_and_answers_have_theirs(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "p.jsonl"
    lines = [{"tokens": 40, "output_tokens": 3}, {"tokens": 9, "output_tokens": 30}, {"prompt": "hello"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    prompts = parse_prompts(file)
    assert prompts[0] == Prompt(Length(40), 3)
    for with_ in (tokenizer, None):
        made = encode_prompts(prompts, with_, 4096, 2, None)
        assert made.effective_tokens == (40, 9)
        assert made.computed_tokens == 80
        assert made.output_tokens == (3, 30)
        assert "UTF-8" not in made.source
    # The third does not say: then nothing is known of the batch.
    assert encode_prompts(prompts, None, 4096, 3, None).output_tokens == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "line 2 is not JSON"),
        ("[]", "line 2 holds no prompt"),
        ('{"messages": [{"role": "user"}]}', "line 2 holds no prompt"),
        ('{"prompt": 3}', "line 2 holds no prompt"),
        ('""', "line 2 holds no prompt"),
        ("7", "line 2 holds no prompt"),
        ('{"tokens": 0}', 'line 2: "tokens" is 0'),
        ('{"tokens": 2.5}', 'line 2: "tokens" is 2.5'),
        ('{"prompt": "a", "output_tokens": -1}', 'line 2: "output_tokens" is -1'),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'"good"\n{line}\n')
    with pytest.raises(UsageError, match=message):
        parse_prompts(file)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "has no prompts"), (b"\n \n", "has no prompts"), (b'"\xff"', "not UTF-8")]
)
def test_an_unreadable_file_is_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        parse_prompts(file)
    with pytest.raises(UsageError, match=r"cannot be read.*check the path"):
        parse_prompts(tmp_path / "absent.jsonl")
