"""A server by URL: every request is accounted for, whatever the server does wrong, and nothing hangs."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("openai")

from llmkern.attribute.requests import in_flight, served
from llmkern.errors import DeviceError, LlmkernError, UsageError
from llmkern.progress import Stages
from llmkern.record.options import TraceOptions
from llmkern.runfolder import RunFolder
from llmkern.serve.by_url import Asked, serve_by_url
from llmkern.serve.remote import Address, text_of
from llmkern.serve.session import ServeOptions
from llmkern.study.plan import Lengths
from tests.serve.stub import KEY, MODEL, stub

FIVE = Lengths(5.0, 0.0, 5, 5)


def asked(tmp_path: Path, arrivals: str, requests: int, patience_s: float = 20.0) -> ServeOptions:
    trace = TraceOptions(MODEL, out=tmp_path / "run")
    return ServeOptions(trace, arrivals, requests, FIVE, FIVE, patience_s=patience_s)


def run(tmp_path: Path, url: str, arrivals: str, requests: int, patience_s: float = 20.0) -> RunFolder:
    options = asked(tmp_path, arrivals, requests, patience_s)
    return RunFolder(serve_by_url(options, Asked(Address(url, MODEL)), Stages(quiet=True)))


@pytest.mark.parametrize("arrivals", ["sequential", "burst", "burst:5@0.05", "uniform:0.001-0.01", "fixed:0.005"])
@pytest.mark.parametrize("only_chat", [False, True])
def test_every_request_is_answered(tmp_path: Path, arrivals: str, only_chat: bool) -> None:
    with stub(only_chat=only_chat) as server:
        found = served(run(tmp_path, server.url, arrivals, 40))
    requests = found.requests
    assert requests["status"].to_list() == ["finished"] * 40
    assert (requests["output_tokens"] == 5).all()
    assert (requests["ttft_s"] > 0).all()
    assert (requests["latency_s"] >= requests["ttft_s"]).all()
    assert found.estimated
    assert found.counter_j is None


@pytest.mark.parametrize("counts", ["yes", "no", "refuses"])
def test_tokens_are_counted_by_the_server_where_it_does(tmp_path: Path, counts: str) -> None:
    """A chunk may hold several tokens: five tokens in chunks of two were three."""
    with stub(of_chunk=2, counts=counts) as server:
        requests = run(tmp_path, server.url, "sequential", 4).table("requests")
    assert requests["status"].to_list() == ["finished"] * 4
    assert requests["output_tokens"].to_list() == [5 if counts == "yes" else 3] * 4
    # The trial was number 0.
    assert requests["prompt_tokens"].to_list() == ([1001, 1002, 1003, 1004] if counts == "yes" else [5] * 4)


def test_whatever_a_server_does_wrong_is_told_of_its_request(tmp_path: Path) -> None:
    # Request number 0 is the trial before.
    faults = {3: "error", 7: "close", 11: "stall", 15: "empty"}
    begin_s = time.monotonic()
    with stub(faults) as server:
        found = run(tmp_path, server.url, "fixed:0.01", 30, patience_s=2.0)
    # It waits for a stalled answer as long as it was told to, and not for ever.
    assert time.monotonic() - begin_s < 25
    requests = found.table("requests")
    assert len(requests) == 30
    failed = requests[requests["status"] != "finished"]
    assert len(failed) == 4
    reasons = " ".join(failed["reason"].astype(str))
    for word in ("out of memory", "without a token", "imed out"):
        assert word in reasons, reasons
    assert (requests["status"] == "finished").sum() == 26


def test_equal_requests_in_flight_share_alike() -> None:
    import pandas as pd

    rows = {"request": [0, 1, 2], "sent_ns": [0, 0, 100], "last_token_ns": [100, 100, 200]}
    iterations, processed = in_flight(pd.DataFrame(rows))
    assert iterations[["start_ns", "end_ns"]].to_numpy().tolist() == [[0, 100], [100, 200]]
    assert processed.groupby("iteration")["request"].apply(list).to_list() == [[0, 1], [2]]


def refused(tmp_path: Path, url: str, model: str = MODEL, key: str = "none") -> str:
    with pytest.raises(LlmkernError) as error:
        serve_by_url(asked(tmp_path, "burst", 2), Asked(Address(url, model, key)), Stages(quiet=True))
    assert isinstance(error.value, DeviceError | UsageError)
    assert not (tmp_path / "run").exists()
    return str(error.value)


def test_a_server_that_cannot_be_asked_is_a_sentence(tmp_path: Path) -> None:
    assert "cannot be reached" in refused(tmp_path, "http://127.0.0.1:9/v1")
    with stub(key=KEY) as server:
        assert "refuses the key (401)" in refused(tmp_path, server.url, key="wrong")
        assert "has no model 'large'; it has: tiny" in refused(tmp_path, server.url, "large", KEY)
    with stub(streams=False) as server:
        assert "answers without streaming" in refused(tmp_path, server.url)
    with stub({0: "error"}) as server:
        assert "answers 500" in refused(tmp_path, server.url)


def test_a_command_that_serves_nothing_is_a_sentence(tmp_path: Path) -> None:
    address = Address("http://127.0.0.1:9/v1", MODEL)
    for command, told in (
        ("false", "ended with exit code 1"),
        ("no-such-command", "cannot be run"),
        ("", "cannot be run"),
    ):
        with pytest.raises(LlmkernError, match=told):
            serve_by_url(asked(tmp_path, "burst", 2), Asked(address, command=command), Stages(quiet=True))


def test_transformers_serve_is_started_asked_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model(tmp_path / "tiny")
    port = free_port()
    where = f"--host 127.0.0.1 --port {port} --device cpu --dtype float32"
    command = f"{Path(sys.executable).parent}/transformers serve {model} --continuous-batching {where}"
    address = Address(f"http://127.0.0.1:{port}/v1", str(model))
    # Without a number of blocks it takes nine tenths of the memory.
    command += " --attn-implementation sdpa --cb-num-blocks 64 --cb-max-batch-tokens 1024"
    options = asked(tmp_path, "burst", 12)
    found = served(RunFolder(serve_by_url(options, Asked(address, command=command), Stages(quiet=True))))
    assert found.requests["status"].to_list() == ["finished"] * 12
    assert found.requests["output_tokens"].between(1, 5).all()
    # It is gone with its children.
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def tiny_model(folder: Path) -> Path:
    """Save a Llama of two layers with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    words = ["<pad>", "<unk>", "<s>", *(f"w{n}" for n in range(509))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>")
    made.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    made.save_pretrained(folder)
    return folder


def test_prompts_share_no_beginning() -> None:
    firsts = {text_of(number, 50, 0).split()[0] for number in range(200)}
    assert len(firsts) > 195
    assert len(text_of(0, 50, 0).split()) == 48
