"""`vllm serve` with adapters by name: a thousand of them, and what has to be an error and leave the server as it is."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.flipped_bits import flip_bit
from support.native_files import reseal
from support.served_models import METHODS, MODELS, Answer, ServedModel
from support.vllm_engine import Question, questions_of, woven, wrong_answers
from support.vllm_server import Reply, Server, answer_of

from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE, save_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]
MANY = 1000
SAMPLED = 8  # of these, whose answers are those of a merged model
ASKED = 1  # the prompt that all are asked
WORKERS = 16  # requests at a time
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"  # the tiny tokenizer has no template


@dataclass
class ByName:
    """A server, its model, and the folder in which it finds adapters."""

    server: Server
    model: ServedModel
    folder: Path

    def ask(self, questions: list[Question], *, prompt_logprobs: bool = False) -> list[Answer]:
        """The answers to questions that are all sent at the same time."""

        def reply(question: Question) -> Answer:
            served, index = question
            return answer_of(self.server.complete(served.name, index, prompt_logprobs=prompt_logprobs), index)

        with ThreadPoolExecutor(len(questions)) as pool:
            return list(pool.map(reply, questions))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A base whose adapters are all below its folder, and so have a name."""
    return ServedModel("llama", tmp_path_factory.mktemp("named"), MODELS["llama"])


@pytest.fixture(scope="module", params=["tied", "both"])
def by_name(
    request: pytest.FixtureRequest, llama: ServedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ByName]:
    """A server of each mode with slots of the plugin's own; one is started by vLLM's command and one by ours."""
    log, room = tmp_path_factory.mktemp("log") / "log", str(MANY + 50)
    llama.of_method("tl6", "all")  # `tiedlora serve` takes the target modules from what is there
    by_command = request.param == "both"
    options = "--max-cpu-loras", room, "--chat-template", CHAT
    with Server(llama, request.param, llama.root, log, *options, by_command=by_command) as server:
        yield ByName(server, llama, llama.root)


@pytest.fixture
def tied(by_name: ByName) -> ByName:
    """The server with tied slots alone; the tests of this fixture need not be repeated with both kinds."""
    if by_name.server.mode == "both":
        pytest.skip("asked of the server with tied slots alone")
    return by_name


# Right names --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thousand(llama: ServedModel) -> list[str]:
    """The names of a thousand adapters with different values."""
    first = llama.native("many/a0000", "tl6", rank=4, seed=5000)
    generator = torch.Generator().manual_seed(1)
    for number in range(1, MANY):
        state = {
            name: value * (1 + 0.5 * torch.rand(value.shape, generator=generator))
            for name, value in first.state.items()
        }
        save_adapter(llama.root / f"many/a{number:04}", replace(first, state=state))
    return [f"many/a{number:04}" for number in range(MANY)]


def test_a_thousand_by_name(tied: ByName, thousand: list[str]) -> None:
    sampled = random.Random(3).sample(thousand, SAMPLED)
    with ThreadPoolExecutor(WORKERS) as pool:
        ask = partial(tied.server.complete, index=ASKED, count=8)
        replies = dict(zip(thousand, pool.map(ask, thousand), strict=True))
    failed = {name: reply.error for name, reply in replies.items() if reply.status != 200}
    assert not failed
    assert {*tied.server.names()} >= {*thousand}
    first = {name: answer_of(reply, ASKED).tokens for name, reply in replies.items()}
    assert len({tuple(tokens) for tokens in first.values()}) > MANY // 10  # they differ
    merged = [tied.model.merged_answers(name) for name in sampled]
    asked = woven(*(questions_of(served, most=2) for served in [*merged, tied.model.base]))
    assert not wrong_answers(asked, tied.ask(asked, prompt_logprobs=True))
    of_first = [served for served in merged if ASKED in served.questions]
    assert len(of_first) > SAMPLED // 2
    assert not [one.name for one in of_first if first[one.name] != one.questions[ASKED].tokens[:8]]


def test_each_kind_by_name(by_name: ByName) -> None:
    model = by_name.model
    kinds = [
        model.of_method("tl6", "all"),
        model.vera("vera-all"),
        model.vera("vera-qv"),
        model.of_method("vera", "some"),
    ]
    kinds += [model.exported("tl6", "all", native=True)]
    if by_name.server.mode == "both":
        kinds += [model.of_method("lora", "all"), model.exported("lora", "some", native=False)]
    asked = woven(*(questions_of(served) for served in [*kinds, model.base]))
    assert not wrong_answers(asked, by_name.ask(asked))
    assert not wrong_answers(asked, by_name.ask(asked, prompt_logprobs=True))


def test_a_chat_is_a_completion_of_what_its_template_makes(by_name: ByName) -> None:
    """The request that `vllm chat --model-name NAME` sends."""
    given = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    found = {}
    for name in (by_name.model.of_method("tl6", "all").name, "base"):
        chat = {"model": name, "messages": [{"role": "user", "content": "What is tied?"}], **given}
        reply = by_name.server.call("/v1/chat/completions", chat)
        assert reply.status == 200 and reply.content["choices"][0]["message"]["role"] == "assistant", reply
        prompt = {"model": name, "prompt": reply.content["prompt_token_ids"], **given}
        completed = by_name.server.call("/v1/completions", prompt)
        found[name], expected = (one.content["choices"][0]["token_ids"] for one in (reply, completed))
        assert found[name] == expected and len(expected) == 8
    assert len({*map(tuple, found.values())}) == 2


# What is an error ---------------------------------------------------------------------------------------------------


def error_beside_others(by_name: ByName, name: str) -> Reply:
    """What a request by a wrong name gives, sent twice. Good requests at the same time and after it are answered as
    ever."""
    model, server = by_name.model, by_name.server
    good = woven(questions_of(model.of_method("tl6", "all")), questions_of(model.base))
    with ThreadPoolExecutor(2) as pool:
        wrong = [pool.submit(server.complete, name, ASKED) for _ in range(2)]
        assert not wrong_answers(good, by_name.ask(good))
        first, second = (each.result() for each in wrong)
    assert first.status == second.status and first.error == second.error
    assert server.healthy() and server.process.poll() is None
    assert not wrong_answers(good, by_name.ask(good))
    assert name not in server.names()
    return first


@pytest.mark.parametrize(
    "name", ["nothing", "many", "../named0", "../outside", "tl6-all/../tl6-all", "/etc", "a" * 4000]
)
def test_names_without_an_adapter(by_name: ByName, name: str) -> None:
    outside = by_name.folder.parent / "outside"
    if not outside.exists():
        outside.symlink_to(by_name.model.of_method("tl6", "all").folder or "")
    reply = error_beside_others(by_name, name)
    assert reply.status == 404, reply


def damaged(model: ServedModel) -> None:
    """A flipped bit in the tensors."""
    model.native("bad-bit", "tl6", seed=71)
    flip_bit(model.root / "bad-bit" / WEIGHTS_FILE, "A", row=1, column=3, bit=9)


def truncated(model: ServedModel) -> None:
    """Half of the tensors."""
    model.native("bad-half", "tl6", seed=72)
    file = model.root / "bad-half" / WEIGHTS_FILE
    os.truncate(file, file.stat().st_size // 2)


def no_json(model: ServedModel) -> None:
    """A config that is no JSON."""
    model.native("bad-json", "tl6", seed=73)
    (model.root / "bad-json" / CONFIG_FILE).write_text("{")


def other_weights(model: ServedModel) -> None:
    """An adapter of a base with the same shape and other weights."""
    other = ServedModel("llama", model.root / "bad-base", model.shape, seed=9)
    other.native("adapter", "tl6", seed=74)


def other_shape(model: ServedModel) -> None:
    """An adapter of a base with another shape."""
    other = ServedModel("qwen3", model.root / "bad-shape", MODELS["qwen3"])
    other.native("adapter", "tl6", seed=75)


def too_high(model: ServedModel) -> None:
    """A rank above the server's."""
    model.native("bad-rank", "tl6", rank=16, seed=76)


def not_finite(model: ServedModel) -> None:
    """A value that is not finite, with checksums that fit."""
    adapter = model.native("bad-value", "tl6", seed=77)
    state = {**adapter.state, "u": torch.full_like(adapter.state["u"], float("inf"))}
    save_adapter(model.root / "bad-value", replace(adapter, state=state))
    reseal(model.root / "bad-value")


def untied(model: ServedModel) -> None:
    """The method lora, which tied slots cannot hold."""
    model.native("bad-method", "lora", seed=78)


def plain(model: ServedModel) -> None:
    """A plain LoRA, which tied slots cannot hold."""
    model.exported("tl6", "qkv", native=False)


# By the name that is asked for: what writes it, and what the error has to say.
WRONG = {
    "bad-bit": (damaged, ["checksum"]),
    "bad-half": (truncated, ["not a complete safetensors file"]),
    "bad-json": (no_json, ["not valid JSON"]),
    "bad-base": (other_weights, ["weights"]),
    "bad-shape": (other_shape, ["num_layers 4"]),
    "bad-rank": (too_high, ["16", "8", "--max-lora-rank"]),
    "bad-value": (not_finite, ["finite"]),
}
WRONG_KIND = {"bad-method": (untied, ["lora", '"both"']), "tl6-qkv-plain": (plain, ["method lora", '"both"'])}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_KIND])
def test_adapters_that_cannot_be_served(by_name: ByName, name: str) -> None:
    both = by_name.server.mode == "both"
    if both and name in WRONG_KIND:
        pytest.skip("served by vLLM's own slots")
    write, words = {**WRONG, **WRONG_KIND}[name]
    write(by_name.model)
    reply = error_beside_others(by_name, name)
    assert reply.status == 400
    assert "\n" not in reply.error.strip() and name in reply.error
    assert not [word for word in words if word not in reply.error]


def test_a_path_to_a_damaged_adapter(by_name: ByName) -> None:
    """vLLM's own way to load a folder at run time comes to the same reasons."""
    damaged(by_name.model)
    body = {"lora_name": "given", "lora_path": str(by_name.folder / "bad-bit")}
    reply = by_name.server.call("/v1/load_lora_adapter", body)
    if by_name.server.mode == "both":  # `tiedlora serve` loads by name only
        assert reply.status == 404 and "loaded by their names" in reply.error
        return
    assert reply.status >= 400 and "checksum" in reply.error and "\n" not in reply.error.strip()
    asked = questions_of(by_name.model.of_method("tl6", "all"))
    assert not wrong_answers(asked, by_name.ask(asked))


def test_an_adapter_that_is_repaired(by_name: ByName) -> None:
    """The name of an adapter that could not be served is asked for again, and not remembered as wrong."""
    model, name = by_name.model, f"repaired-{by_name.server.mode}"
    served = model.served(name, "tl6", rank=4, seed=79)
    content = (model.root / name / CONFIG_FILE).read_text()
    (model.root / name / CONFIG_FILE).write_text("{")
    assert by_name.server.complete(name, ASKED).status == 400
    (model.root / name / CONFIG_FILE).write_text(content)
    asked = questions_of(served)
    assert not wrong_answers(asked, by_name.ask(asked))


def test_more_adapters_than_slots_at_the_same_time(by_name: ByName) -> None:
    model = by_name.model
    adapters = [model.of_method(method, "all") for method in METHODS if method != "lora"]
    adapters += [model.vera("vera-all"), model.vera("vera-qv"), model.of_method("tl6", "qkv")]
    asked = woven(*(questions_of(served, most=2) for served in [*adapters, model.base]))
    assert not wrong_answers(asked, by_name.ask(asked))
