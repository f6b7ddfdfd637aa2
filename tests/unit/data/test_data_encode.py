"""Tokenizers, ids and masks, on a byte-level tokenizer and a LLaMA-like SentencePiece model."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from support.nemo_files import require_exact_sentencepiece
from support.task_files import refusal
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_tiedlora.data.encode import adds_prefix_space, encode_dataset, encode_prompts
from megatron_tiedlora.data.loader import collate
from megatron_tiedlora.data.task import Example, Reading
from megatron_tiedlora.data.token_dataset import TokenDataset, check_supervised
from megatron_tiedlora.data.tokenizer import check_vocabulary, load_tokenizer, padding_id, save_tokenizer
from megatron_tiedlora.parallel.loss import IGNORED_LABEL

CORPUS = [
    "Question: Tom has 12 apples and buys 345 more. How many apples has Tom?",
    "Answer: Tom has 12+345=357 apples.\n#### 357",
    "the quick brown fox jumps over the lazy dog; naïve café déjà vu",
] * 20

TEXTS = [
    "Tom has 12,345.60 apples", "a\nb\n\n c", "  two leading", " 42", "naïve 日本語 😀", "tab\tx", "", " ", "\n",
    "trail  ",    "a   b    c", "▁raw ▁", "</s> and <unk> and <0x0A>", "e\u0301 ﬁ ① \u00a0", "Answer:", "x" * 40,
]  # fmt: skip


@pytest.fixture(scope="module")
def spm_file(tmp_path_factory) -> Path:
    """A SentencePiece model trained with the options of LLaMA's."""
    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), vocab_size=400, model_type="bpe", byte_fallback=True,
        split_digits=True, add_dummy_prefix=True, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        normalization_rule_name="identity", num_threads=1, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def spm(spm_file):
    require_exact_sentencepiece()
    return load_tokenizer(spm_file)


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory) -> Path:
    """A SmolLM2-like tokenizer: digits one by one, padding = EOS, a class name that would lose the digits."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, "12345 " * 50], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    return folder


@pytest.fixture(scope="module")
def byte_level(byte_folder):
    return load_tokenizer(byte_folder)


@pytest.fixture(params=["byte_level", "spm"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


WITH_BOS = Reading(add_bos="true")


def prompt_length(sample: TokenDataset) -> int:
    """Number of tokens before the first supervised one."""
    return int(sample.supervised.argmax())


def encode_example(tokenizer, sample: Example, **keywords) -> TokenDataset:
    """One sample alone, with BOS."""
    return encode_dataset([sample], tokenizer, reading=WITH_BOS, **keywords)


def example(prompt: str = "Question: Tom?\nAnswer:", completion: str = " 357 apples") -> Example:
    return Example(prompt=prompt, completion=completion, source="data.jsonl:7")


# Loading ----------------------------------------------------------------------------------------------------


def test_an_old_transformers_is_told_to_those_with_a_sentencepiece_file(spm_file, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.23.1")
    message = refusal(lambda: load_tokenizer(spm_file))
    assert "tokenizer.model: transformers 5.23.1 produces different ids " in message and message.endswith(">=5.24'`")


def test_sentencepiece_file_gives_sentencepiece_ids(spm_file, spm, tmp_path):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spm_file))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/tokenizer.model").write_bytes(spm_file.read_bytes())
    (tmp_path / "bare/config.json").write_text('{"model_type": "llama"}')
    save_tokenizer(spm, tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text('{"model_type": "llama"}')
    loaded = {
        "file": spm,
        "folder with the file alone": load_tokenizer(tmp_path / "bare"),
        "saved": load_tokenizer(tmp_path / "saved"),
        "saved, read by transformers": AutoTokenizer.from_pretrained(tmp_path / "saved"),
    }
    for name, tokenizer in loaded.items():
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (processor.bos_id(), processor.eos_id()), name
        assert len(tokenizer) == processor.get_piece_size()
        for text in TEXTS:
            assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text), (name, text)
    config = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config


def test_tokenizer_json_is_read_as_it_stands(byte_level, tmp_path):
    save_tokenizer(byte_level, tmp_path)
    for tokenizer in (byte_level, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]


def test_folder_with_file_and_config_keeps_the_template(spm_file, tmp_path):
    require_exact_sentencepiece()
    (tmp_path / "tokenizer.model").write_bytes(spm_file.read_bytes())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    config = {**tokens, "chat_template": "{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == config["chat_template"] and tokenizer.pad_token_id == 0
    assert tokenizer.encode("x</s>", add_special_tokens=False)[-1] == tokenizer.eos_token_id  # templates write it


def test_missing_and_corrupt_tokenizers(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text('{"version": ')
    (tmp_path / "broken.model").write_bytes(b"not a model")
    (tmp_path / "file.txt").write_text("x")
    for name in ("empty", "broken", "broken.model", "file.txt", "missing", "missing.model"):
        message = refusal(lambda name=name: load_tokenizer(tmp_path / name))
        assert str(tmp_path / name) in message and "--tokenizer" in message
    assert "some/repo" in refusal(lambda: load_tokenizer("some/repo"))


def test_a_vocabulary_or_special_token_beyond_the_embedding(byte_folder):
    tokenizer = load_tokenizer(byte_folder)
    size = len(tokenizer)
    check_vocabulary(tokenizer, size)
    message = refusal(lambda: check_vocabulary(tokenizer, size - 1))
    assert str(size) in message and str(size - 1) in message
    tokenizer.add_special_tokens({"pad_token": "<extra pad>"})
    message = refusal(lambda: check_vocabulary(tokenizer, size))
    assert "<extra pad>" in message and str(size + 1) in message and str(size) in message


def test_padding_id_and_prefix_space(byte_level, spm):
    assert padding_id(byte_level) == byte_level.eos_token_id
    assert spm.pad_token_id is None and padding_id(spm) == spm.eos_token_id
    assert adds_prefix_space(spm) and not adds_prefix_space(byte_level)


# Ids and masks ----------------------------------------------------------------------------------------------


def test_one_bos_and_a_supervised_eos(tokenizer):
    sample = encode_example(tokenizer, example(), max_length=100)
    tokens = sample.tokens.tolist()
    assert sample.tokens.dtype == np.int32 and not sample.truncated_prompts
    assert tokens[0] == tokenizer.bos_token_id and tokens.count(tokenizer.bos_token_id) == 1
    assert tokens[-1] == tokenizer.eos_token_id and tokens.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens[1:-1]) == "Question: Tom?\nAnswer: 357 apples"
    assert tokenizer.decode(tokens[prompt_length(sample) : -1]).strip() == "357 apples"
    dataset = encode_dataset([example()], tokenizer, max_length=100, reading=WITH_BOS)
    batch = collate(dataset, [[0]], pad_id=tokenizer.eos_token_id)  # padding equals EOS, and EOS is still a target
    targets = batch.labels[batch.labels != IGNORED_LABEL].tolist()
    assert targets == tokens[prompt_length(sample) :] and targets[-1] == tokenizer.eos_token_id
    assert len(targets) == batch.num_supervised == dataset.num_supervised
    # A chat template writes BOS itself, and an answer may spell EOS.
    written = example(prompt=f"{tokenizer.bos_token}user Tom\n", completion=f"yes{tokenizer.eos_token}")
    tokens = encode_example(tokenizer, written, max_length=99).tokens.tolist()
    assert tokens.count(tokenizer.bos_token_id) == tokens.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Answer:", " 42"), ("Answer:\n", "42"), ("A:", "\n42"), ("A:", "  42"), ("<user>", "Tom"), ("A:", " é\n 日本")],
)
def test_no_space_is_added_or_lost(tokenizer, prompt, completion):
    sample = encode_example(tokenizer, example(prompt, completion), max_length=100)
    assert tokenizer.decode(sample.tokens[1:-1].tolist()) == prompt + completion


def test_generation_sees_the_prompt_of_training(tokenizer):
    sample = encode_example(tokenizer, example(), max_length=100)
    (prompt,), _ = encode_prompts(tokenizer, [example()], max_length=100, reading=WITH_BOS)
    assert prompt.tolist() == sample.tokens[: prompt_length(sample)].tolist()
    prompts = [example(), example(prompt="other " * 50)]
    both, num_cut = encode_prompts(tokenizer, prompts, max_length=20, reading=WITH_BOS)
    assert num_cut == 1
    assert (both[0] == prompt).all() and len(both[1]) == 20 and both[1][0] == tokenizer.bos_token_id


def test_the_prompts_middle_is_cut_and_never_the_answer(tokenizer):
    long = example(prompt=" ".join(str(number) for number in range(100, 300)))
    whole = encode_example(tokenizer, long, max_length=1000)
    cut = encode_example(tokenizer, long, max_length=40)
    answer = whole.tokens[prompt_length(whole) :].tolist()
    assert cut.truncated_prompts == 1 and len(cut.tokens) == 40
    assert cut.tokens[prompt_length(cut) :].tolist() == answer
    prompt, kept = whole.tokens[: prompt_length(whole)].tolist(), cut.tokens[: prompt_length(cut)].tolist()
    head = 1 + len(kept) // 2  # BOS is not part of the halves
    assert kept[:head] == prompt[:head] and kept[head:] == prompt[head - len(kept) :]
    dataset = encode_dataset([long, example()], tokenizer, max_length=60, reading=WITH_BOS)
    assert (len(dataset), dataset.truncated_prompts) == (2, 1)


def test_an_answer_that_does_not_fit_is_refused(tokenizer):
    whole = encode_example(tokenizer, example(), max_length=1000)
    answer = len(whole.tokens) - prompt_length(whole)
    shortest = answer + 2  # BOS and one token of the prompt
    sample = encode_example(tokenizer, example(), max_length=shortest)
    assert len(sample.tokens) == shortest and prompt_length(sample) == 2
    message = refusal(lambda: encode_example(tokenizer, example(), max_length=shortest - 1))
    assert "data.jsonl:7" in message and "--max_length" in message and str(answer) in message


def test_dataset_layout_and_counts(tokenizer):
    examples = [example(f"Question: {'dog ' * i}?\nAnswer:", f" {i} apples") for i in range(1, 6)]
    dataset = encode_dataset(examples, tokenizer, max_length=100, reading=WITH_BOS)
    single = [encode_example(tokenizer, item, max_length=100) for item in examples]
    assert (dataset.tokens.dtype, dataset.offsets.dtype, dataset.supervised.dtype) == (np.int32, np.int64, np.bool_)
    assert dataset.prompt_lengths.tolist() == [prompt_length(sample) for sample in single]
    for index, sample in enumerate(single):
        assert (dataset.sample(index) == sample.tokens).all()
        assert dataset.num_supervised_of([index])[0] == len(sample.tokens) - prompt_length(sample)
    assert dataset.num_supervised == sum(len(sample.tokens) - prompt_length(sample) for sample in single)
    assert dataset.lengths.sum() == len(dataset.tokens)


def test_no_supervised_token_and_no_eos(byte_level, byte_folder):
    assert "no supervised token" in refusal(lambda: encode_dataset([], byte_level, max_length=9))
    dataset = encode_dataset([example()], byte_level, max_length=99)
    nothing = TokenDataset(dataset.tokens, dataset.offsets, np.zeros_like(dataset.supervised))
    assert "data.jsonl" in refusal(lambda: check_supervised(nothing, "data.jsonl"))
    endless = load_tokenizer(byte_folder)
    endless.eos_token = None
    assert str(byte_folder) in refusal(lambda: encode_example(endless, example(), max_length=100))
