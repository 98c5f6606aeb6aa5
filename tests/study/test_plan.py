"""Plans: what they make, and what is wrong with them, with the line of the file."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from llmkern.errors import UsageError
from llmkern.study.cost import Size, most_informative, seconds
from llmkern.study.plan import BUILT_IN, Lengths, read_plan
from llmkern.study.prompts import batch_of, drawn, laid, pool, write_prompts
from llmkern.workload.models import REGISTRY
from llmkern.workload.prompts import parse_prompts


def plan(tmp_path: Path, text: str) -> str:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_plans_are_plans(name: str) -> None:
    source = read_plan(name, {}, {})
    found = source.configurations()
    assert len({one.name for one in found}) == len(found)
    assert {one.model for one in found} <= set(REGISTRY)
    assert source.plan.title


def test_the_command_line_changes_axes_and_options() -> None:
    source = read_plan("precision", {"model": ["qwen-tiny"], "precision": ["bf16", "int8-fused"]}, {"repeats": 3})
    first, second = source.configurations()
    assert (first.model, first.precision, first.engine) == ("qwen-tiny", "bf16", "eager")
    assert (second.precision, second.engine) == ("int8", "fused")
    assert source.plan.options.repeats == 3
    assert second.name == "qwen-tiny-int8-fused-b1-p512-n32-d0"


def test_exclusions_leave_out_what_has_all_of_their_values(tmp_path: Path) -> None:
    text = '[axes]\nmodel = ["a"]\nprecision = ["fp32", "bf16"]\nengine = ["eager", "fused"]\n'
    text += '[[exclude]]\nprecision = "fp32"\nengine = "fused"\n'
    found = read_plan(plan(tmp_path, text), {}, {}).configurations()
    assert [(one.precision, one.engine) for one in found] == [("fp32", "eager"), ("bf16", "eager"), ("bf16", "fused")]


AXES = '[axes]\nmodel = ["a"]\n'
LENGTHS = "{ median = 5, sigma = 1, low = 1, high = 9 }"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('title = "x\n', r"plan.toml is no TOML \(.*line 1"),
        ("", "missing required field `axes`"),
        (AXES + 'precisoin = ["bf16"]\n', "line 3: 'precisoin' is unknown there; known are model, precision"),
        (AXES + 'precision = [\n  "bf16",\n  "fp8",\n]\n', "line 5: precision has 'fp8'.*known are fp32, bf16"),
        ("[axes]\nmodel = []\n", "line 2: model: expected `array` of length >= 1"),
        ('[axes]\nmodel = "a"\n', "line 2: model: expected `array`, got `str`"),
        (AXES + "batch = [1, 0]\n", "line 3: batch has 0: expected `int` >= 1"),
        (AXES + "new_tokens = [1]\n", "line 3: new_tokens has 1: expected `int` >= 2"),
        ('[axes]\nmodel = ["a",\n  "b",\n  "a"]\n', "model has 'a' twice"),
        (AXES + '[options]\nrecord = "all"\n', "line 4: record: .*known are windows, timeline, replays"),
        (AXES + 'prompts = ["x"]\n', "line 3: there are no prompts called 'x'"),
        (AXES + 'prompts = ["x"]\n[prompts.x]\npool = 3\n', r"line 4 has no source: give one of lengths, file"),
        (AXES + f'prompts = ["x"]\n[prompts.x]\nlengths = {LENGTHS}\n', "line 4 has no outputs"),
        (
            AXES + 'prompts = ["x"]\n[prompts.x]\nlengths = { median = 1, sigma = 1, low = 2, high = 3 }\n',
            "line 5: lengths have a median of 1",
        ),
        (AXES + '[[exclude]]\nsize = "a"\n', "line 3: 'size' is no axis"),
        (AXES + '[[exclude]]\nmodel = "a"\n', "line 3: nothing is left of the plan"),
        (AXES + f"batch = {list(range(1, 201))}\ndraw = {list(range(200))}\n", "make 40,000 runs, at most 10,000"),
        ("axes = 3\n", "line 1: axes: expected `object`"),
    ],
)
def test_what_is_wrong_is_a_sentence_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as error:
        read_plan(plan(tmp_path, text), {}, {}).configurations()
    assert "plan.toml" in str(error.value)


def test_no_plan_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no plan absent: give a TOML file, or one of precision"):
        read_plan("absent", {}, {})
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(str(tmp_path), {}, {})
    (tmp_path / "x.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not UTF-8"):
        read_plan(str(tmp_path / "x.toml"), {}, {})


def test_lengths_are_log_normal_within_their_limits() -> None:
    import random
    import statistics

    found = drawn(Lengths(median=800, sigma=0.7, low=200, high=4000), 4000, random.Random(1))
    assert min(found) >= 200
    assert max(found) <= 4000
    # Cut at both ends the median moves a little.
    assert statistics.median(found) == pytest.approx(830, rel=0.05)


def test_sorted_batches_are_buckets_of_like_length_and_random_ones_are_not(tmp_path: Path) -> None:
    source = read_plan("batch", {}, {})
    pools = {name: pool(prompts, "x", tmp_path) for name, prompts in source.plan.prompts.items()}
    assert Counter(line["tokens"] for line in pools["random"]) == Counter(line["tokens"] for line in pools["sorted"])

    def padding(name: str) -> float:
        batches = [
            [line["tokens"] for line in batch_of(laid(pools[name], source.plan.prompts[name]), 16, draw, 3)]
            for draw in range(3)
        ]
        return sum(16 * max(batch) for batch in batches) / sum(map(sum, batches))

    assert padding("sorted") < 1.15 < padding("random")


def test_draws_lie_evenly_over_the_pool_and_a_small_pool_is_gone_through_again() -> None:
    lines = [{"tokens": n} for n in range(12)]
    assert [batch_of(lines, 2, draw, 3)[0]["tokens"] for draw in range(3)] == [2, 6, 10]
    assert batch_of(lines, 4, 0, 1)[0]["tokens"] == 4
    assert [line["tokens"] for line in batch_of(lines[:2], 5, 0, 1)] == [0, 1, 0, 1, 0]


def test_prompts_of_a_run_are_a_file_that_trace_reads(tmp_path: Path) -> None:
    source = read_plan("batch", {"batch": [4], "draw": [0], "prompts": ["random"]}, {})
    (one,) = source.configurations()
    written = write_prompts(source, one, tmp_path)
    prompts = parse_prompts(written.file)
    assert len(prompts) == 4
    assert max(prompt.content.tokens for prompt in prompts) == written.longest  # type: ignore[union-attr]
    assert max(prompt.output_tokens or 0 for prompt in prompts) == written.answers


@pytest.mark.parametrize("order", ["random", "sorted"])
def test_every_batch_size_is_prefilled_with_the_same_prompts(tmp_path: Path, order: str) -> None:
    """A batch of one prompt says nothing of batches of one: another prompt is four times as long."""
    source = read_plan("batch", {"batch": [1, 8, 32, 64], "draw": [0, 1], "prompts": [order]}, {})
    sets: dict[int, set[tuple[str, ...]]] = {0: set(), 1: set()}
    for one in source.configurations():
        written = write_prompts(source, one, tmp_path)
        lines = written.file.read_text().splitlines()
        assert len(lines) == one.batch
        if one.batch == 64:
            assert written.prompt_set is None
            sets[one.draw].add(tuple(sorted(lines)))
        else:
            assert written.prompt_set is not None
            every = written.prompt_set.read_text().splitlines()
            assert set(lines) <= set(every)
            sets[one.draw].add(tuple(sorted(every)))
    assert [len(found) for found in sets.values()] == [1, 1]
    assert sets[0] != sets[1]


def test_a_set_that_is_no_whole_batches_is_told_with_its_line(tmp_path: Path) -> None:
    text = AXES + f'batch = [4]\nprompts = ["x"]\n[prompts.x]\nset = 6\nlengths = {LENGTHS}\noutputs = {LENGTHS}\n'
    source = read_plan(plan(tmp_path, text), {}, {})
    with pytest.raises(UsageError, match=r"line \d+: a set of 6 prompts is no whole number of batches of 4"):
        write_prompts(source, source.configurations()[0], tmp_path / "out")


def test_prompts_of_a_file_keep_their_texts_and_answers(tmp_path: Path) -> None:
    lines = [{"prompt": "a" * 40}, {"tokens": 7, "output_tokens": 5}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = AXES + f'batch = [2]\nprompts = ["x"]\n[prompts.x]\nfile = "mine.jsonl"\noutputs = {LENGTHS}\n'
    source = read_plan(plan(tmp_path, text), {}, {})
    written = write_prompts(source, source.configurations()[0], tmp_path / "out")
    prompts = {type(prompt.content).__name__: prompt for prompt in parse_prompts(written.file)}
    assert prompts["Length"].output_tokens == 5
    assert 1 <= (prompts["str"].output_tokens or 0) <= 9
    assert written.longest == 10
    assert written.answers == max(5, prompts["str"].output_tokens or 0)


class Hub:
    """Stand in for the package datasets, which CI has no network for."""

    rows: tuple[dict[str, object], ...] = ()

    def load_dataset(self, name: str, split: str, streaming: bool) -> Hub:
        assert streaming
        if name != "org/chats":
            raise FileNotFoundError(f"{name} does not exist")
        return self

    def take(self, count: int) -> list[dict[str, object]]:
        return list(self.rows[:count])


def of_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, *rows: dict[str, object]) -> list[object]:
    hub = Hub()
    hub.rows = rows
    monkeypatch.setitem(sys.modules, "datasets", hub)  # type: ignore[arg-type]
    text = AXES + f'prompts = ["x"]\n[prompts.x]\ndataset = "{name}"\noutputs = {LENGTHS}\n'
    source = read_plan(plan(tmp_path, text), {}, {})
    written = write_prompts(source, source.configurations()[0], tmp_path / "out")
    return [prompt.content for prompt in parse_prompts(written.file)]


def test_prompts_of_a_data_set_are_what_users_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]
    found = of_hub(tmp_path, monkeypatch, "org/chats", {"id": 1, "messages": chat})
    assert found == [[{"role": "user", "content": "why?"}]]
    shared = [{"from": "human", "value": "how?"}, {"from": "gpt", "value": "so"}]
    found = of_hub(tmp_path, monkeypatch, "org/chats", {"conversations": shared})
    assert found == [[{"role": "user", "content": "how?"}]]
    assert of_hub(tmp_path, monkeypatch, "org/chats", {"text": "a story"}) == ["a story"]


def test_a_data_set_that_cannot_be_had_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=r"line 4: data set org/none \(train\) cannot be had \(org/none does not exist\)"
    ):
        of_hub(tmp_path, monkeypatch, "org/none")
    with pytest.raises(UsageError, match=r"has no column messages or .* \(it has id\)"):
        of_hub(tmp_path, monkeypatch, "org/chats", {"id": 1})
    with pytest.raises(UsageError, match="holds neither texts nor chats"):
        of_hub(tmp_path, monkeypatch, "org/chats", {"text": 7})
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = AXES + f'prompts = ["x"]\n[prompts.x]\ndataset = "org/chats"\noutputs = {LENGTHS}\n'
    source = read_plan(plan(tmp_path, text), {}, {})
    with pytest.raises(UsageError, match="pip install datasets"):
        write_prompts(source, source.configurations()[0], tmp_path / "out")


def test_the_most_informative_runs_come_first_and_fit_the_budget() -> None:
    source = read_plan("precision", {"model": ["qwen-0.5b", "qwen-7b"], "precision": ["bf16", "int8", "int4"]}, {})
    runs = source.configurations()
    cost = {one.name: 10.0 if one.model == "qwen-0.5b" else 30.0 for one in runs}
    taken = most_informative(runs, cost.__getitem__, 75.0)
    assert sum(cost[one.name] for one in taken) <= 75
    # Both models and all precisions are met before anything is met twice.
    assert {one.precision for one in taken} == {"bf16", "int8", "int4"}
    assert {one.model for one in taken} == {"qwen-0.5b", "qwen-7b"}
    assert most_informative(runs, cost.__getitem__, 5.0) == []


def test_thousands_of_runs_are_no_wait() -> None:
    axes = {"batch": list(range(1, 101)), "prompt_tokens": list(range(1, 101)), "model": ["qwen-7b"]}
    runs = read_plan("precision", {**axes, "precision": ["bf16"]}, {}).configurations()
    assert len(runs) == 10_000
    taken = most_informative(runs, lambda name: 1.0, 150.0)
    # A value of each axis that was not met before, as long as there is one.
    assert len({one.batch for one in taken[:100]}) == len({one.prompt_tokens for one in taken[:100]}) == 100


def test_other_prompts_are_another_run(tmp_path: Path) -> None:
    files = []
    for seed in (0, 1):
        text = AXES + f'prompts = ["x"]\n[prompts.x]\nseed = {seed}\nlengths = {LENGTHS}\noutputs = {LENGTHS}\n'
        source = read_plan(plan(tmp_path, text), {}, {})
        files.append(write_prompts(source, source.configurations()[0], tmp_path).file.name)
    assert files[0] != files[1]


def test_larger_runs_are_guessed_to_take_longer() -> None:
    (one,) = read_plan("precision", {"model": ["qwen-7b"], "precision": ["bf16"]}, {}).configurations()
    small, large = (Size("cuda", n, 2 * n, 28, 512, 32) for n in (5 * 10**8, 14 * 10**9))
    assert seconds(one, small, "windows", None) < seconds(one, large, "windows", None)
    assert seconds(one, small, "windows", None) < seconds(one, small, "timeline", None)
    assert seconds(one, small, "timeline", None) < seconds(one, small, "replays", None)
