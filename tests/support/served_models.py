"""Tiny models with adapters that vLLM serves, and what their merged models answer in transformers in fp32.

Heads have 32 features, the fewest that vLLM's attention takes on a CPU, and there are fewer key-value heads than heads.
An answer is greedy. A prompt is asked only where right implementations in fp32 agree: no token is decided by less than
`SMALLEST_GAP`, and fp64 differs by less than `LARGEST_ERROR`; and where the adapter's tokens are not the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from support.native_files import write_native
from support.oracle import OracleConfig
from support.oracle_adapter import ALL_TARGETS, TRAINED_TENSORS
from support.peft_models import hf_model, vera_model
from support.tiny_models import random_adapter, tiny_model, write_tiny_tokenizer

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "head_dim": 32, "num_layers": 5, "intermediate_size": 96},
    "qwen3": {"family": "qwen3", "hidden_size": 64, "head_dim": 32, "num_layers": 4, "intermediate_size": 96},
    "phi3": {"family": "phi3", "hidden_size": 128, "num_layers": 4, "intermediate_size": 96},
}
# What an adapter changes: targets, layers (1-based, all where None) and its rank. alpha is 1.5 times the rank, and an
# update is small enough that the fp32 errors of an adapted model are near the base's.
PARTS: dict[str, tuple[tuple[str, ...], tuple[int, ...] | None, int]] = {
    "qkv": (("qkv",), None, 8),
    "all": (ALL_TARGETS, None, 4),
    "some": (("qkv", "down_proj"), (1, 2, 4), 6),
}
METHODS = tuple(TRAINED_TENSORS)
SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# VeRA of PEFT: the modules, and whether A and B are in the file or drawn again from its key.
VERAS = {
    "vera-all": {"separate": SEPARATE, "fused": FUSED, "save_projection": True},
    "vera-qv": {"separate": ("q_proj", "v_proj"), "fused": ("qkv_proj",), "save_projection": False},
}
COUNT = 32  # tokens of an answer
SMALLEST_GAP = 1e-3  # between the two largest logits; serving differs by some 1e-5
LARGEST_ERROR = 1e-5  # of log-probabilities in fp32
LENGTHS = (1, 7, 19, 33, 12, 26, 5, 15, 9, 22, 17, 29, 11)  # of the prompts


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, the log-probability of each, and that of each token of the prompt but the first."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float] = field(default_factory=list)


def prompts(vocab_size: int = 320) -> list[list[int]]:
    """Prompts of `LENGTHS` tokens."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def asked(model: Any, double: Any, prompt: list[int]) -> Answer | None:
    """What a model of transformers answers in fp32, or None where another right implementation may answer otherwise.

    Args:
        double: the same model in fp64.
    """
    ids, length = list(prompt), len(prompt)
    found = model(torch.tensor([ids]), use_cache=True)
    for _ in range(COUNT):
        first, second = found.logits[0, -1].topk(2).values.tolist()
        if first - second < SMALLEST_GAP:
            return None
        ids.append(int(found.logits[0, -1].argmax()))
        found = model(torch.tensor([ids[-1:]]), use_cache=True, past_key_values=found.past_key_values)
    single, double = (_logprobs(each, ids) for each in (model, double))
    if (single - double).abs().max() > LARGEST_ERROR:
        return None
    logprobs = single.tolist()
    return Answer(ids[length:], logprobs[length - 1 :], logprobs[: length - 1])


def _logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, (tokens - 1,)."""
    return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@dataclass
class Served:
    """An adapter folder (None: the base itself) and what its merged model answers.

    Attributes:
        questions: by the index of a prompt, the answer; of three prompts, or of all that may be asked for the base.
        tied: whether layers share A and B, so that tied slots can hold it.
    """

    name: str
    folder: Path | None
    questions: Mapping[int, Answer]
    tied: bool = True


@dataclass
class ServedModel:
    """A model folder, and adapters of it that are written when they are asked for, below `root`."""

    name: str
    root: Path
    shape: Mapping[str, Any]
    seed: int = 0
    _served: dict[str, Served] = field(default_factory=dict)

    @cached_property
    def folder(self) -> Path:
        """The base. Its attention is evener than in other tests, so that fp32 is exact to some 1e-5."""
        model = tiny_model(seed=self.seed, **self.shape)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
                    parameter *= 0.4
        model.save_pretrained(self.root / "base")
        return write_tiny_tokenizer(self.root / "base", vocab_size=model.config.get_text_config().vocab_size)

    @cached_property
    def sizes(self) -> OracleConfig:
        """Sizes of the base."""
        return OracleConfig.from_folder(self.folder)

    @cached_property
    def base(self) -> Served:
        """The base, asked every prompt that is decided."""
        model, double = (hf_model(self.folder, dtype) for dtype in (torch.float32, torch.float64))
        answers = {index: asked(model, double, prompt) for index, prompt in enumerate(prompts())}
        return Served("base", None, {index: answer for index, answer in answers.items() if answer is not None})

    def native(self, name: str, method: str, **options: Any) -> NativeAdapter:
        """Write a native folder `name`. `options` as in `random_adapter`; rank 8 and alpha 12 by default."""
        rank = options.pop("rank", 8)
        oracle = random_adapter(method, self.sizes, **{"rank": rank, "alpha": 1.5 * rank, "scale": 0.3, **options})
        return write_native(self.root / name, self.folder, oracle)

    def served(self, name: str, method: str, **options: Any) -> Served:
        """The native folder `name`, written once, with the answers of its merge."""
        if name not in self._served:
            self.native(name, method, **options)
        return self.merged_answers(name)

    def merged_answers(self, name: str) -> Served:
        """The native folder `name`, which is there, with the answers of its merge."""
        if name not in self._served:
            adapter, merged = load_native_adapter(self.root / name), self.root / f"{name}-merged"
            merge_adapter(find_model(str(self.folder)), adapter, merged)
            self._served[name] = self._asked(
                name, self.root / name, hf_model(merged), tied=adapter.config.method != "lora"
            )
        return self._served[name]

    def of_method(self, method: str, part: str) -> Served:
        """The native folder of a method on one of `PARTS`."""
        targets, layers, rank = PARTS[part]
        seed = METHODS.index(method) + 10 * list(PARTS).index(part)
        return self.served(f"{method}-{part}", method, rank=rank, targets=targets, layers=layers, seed=seed)

    def exported(self, method: str, part: str, *, native: bool) -> Served:
        """The PEFT folder of `of_method`, with the native files in it or without, and so a plain LoRA."""
        of, name = self.of_method(method, part), f"{method}-{part}-{'both' if native else 'plain'}"
        if name not in self._served:
            assert of.folder is not None
            adapter, folder = load_native_adapter(of.folder), self.root / name
            export_peft(find_model(str(self.folder)), adapter, folder, native=of.folder if native else None)
            self._served[name] = Served(name, folder, of.questions, tied=native and of.tied)
        return self._served[name]

    def vera(self, name: str) -> Served:
        """A folder of PEFT's own VeRA, one of `VERAS`, with the answers of PEFT's merge."""
        if name not in self._served:
            case = VERAS[name]
            modules = case["fused" if self.name == "phi3" else "separate"]
            peft = vera_model(
                self.folder, r=8, target_modules=list(modules), save_projection=case["save_projection"], d_initial=0.5
            )
            peft.save_pretrained(self.root / name)
            self._served[name] = self._asked(name, self.root / name, peft.merge_and_unload())
        return self._served[name]

    def everything(self) -> list[Served]:
        """Every method on all of `PARTS`, and both of `VERAS`."""
        return [*(self.of_method(method, part) for part in PARTS for method in METHODS), *map(self.vera, VERAS)]

    def _asked(self, name: str, folder: Path, model: Any, *, tied: bool = True) -> Served:
        questions, double = dict[int, Answer](), copy.deepcopy(model).double()
        for index, base in self.base.questions.items():
            answer = asked(model, double, prompts()[index])
            if answer is not None and answer.tokens[:8] != base.tokens[:8]:
                questions[index] = answer
            if len(questions) == 3:
                return Served(name, folder, questions, tied)
        raise AssertionError(f"{self.name}, {name}: only {len(questions)} prompts are decided and not the base's")
