"""vLLM's engine on the CPU in this process, or with tensor parallelism in processes of its own, and what it answers.

vLLM is imported where an engine is started, so that files of tests are collected without it. An adapter is loaded
before a request names it: in this mode an error inside of a step never ends.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from support.served_models import COUNT, FUSED, Answer, Served, ServedModel, prompts

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # of its processes
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
# By the name of a mode, the value of `--additional-config`.
MODES: dict[str, dict[str, Any]] = {"default": {}, "tied": {"tied_lora": True}, "both": {"tied_lora": "both"}}
Question = tuple[Served, int]  # an adapter, or the base, and the index of a prompt
TOLERANCE = 6e-5  # of log-probabilities in fp32


class Engine:
    """An engine with LoRA of one model in a mode. Its adapters keep the numbers by which vLLM knows them."""

    def __init__(self, model: ServedModel, mode: str, **options: Any) -> None:
        """Start it; `options` are of vLLM's `LLM`, in place of these here."""
        from vllm import LLM

        self.model, self.mode = model, mode
        self._ids: dict[tuple[str, int], int] = {}
        self._versions: dict[str, int] = {}
        self.llm: Any = LLM(
            **{
                "model": str(model.folder),
                "dtype": "float32",
                "enable_lora": True,
                "max_lora_rank": 8,
                "max_loras": 8,
                "max_cpu_loras": 64,
                "lora_target_modules": list(FUSED),
                "additional_config": MODES[mode],
                "max_model_len": 96,
                "max_num_seqs": 16,
                "enforce_eager": True,
                "enable_prefix_caching": False,
                "disable_log_stats": True,
                "seed": 0,
                **options,
            }
        )

    def close(self) -> None:
        """End its processes, and leave no state to the next engine of this process."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        forget_engines()

    def request(self, served: Served, **fields: Any) -> Any:
        """vLLM's name for an adapter; None for the base."""
        from vllm.lora.request import LoRARequest

        if served.folder is None:
            return None
        number = self._ids.setdefault((served.name, 0), len(self._ids) + 1)
        return LoRARequest(served.name, number, str(served.folder), **fields)

    def load(self, served: Served, **fields: Any) -> None:
        """Load an adapter, also if it is loaded (then vLLM does nothing, unless `load_inplace`)."""
        if served.folder is not None:
            self.llm.llm_engine.add_lora(self.request(served, **fields))

    def ask(self, questions: Sequence[Question], *, prompt_logprobs: bool = False, load: bool = True) -> list[Answer]:
        """What the engine answers to questions that it gets in one go."""
        from vllm import SamplingParams

        texts = prompts()
        if load:
            for served in {served.name: served for served, _ in questions}.values():
                self.load(served)
        found = self.llm.generate(
            [{"prompt_token_ids": texts[index]} for _, index in questions],
            SamplingParams(
                temperature=0,
                max_tokens=COUNT,
                ignore_eos=True,
                logprobs=1,
                prompt_logprobs=1 if prompt_logprobs else None,
                detokenize=False,
            ),
            lora_request=[self.request(served) for served, _ in questions],
            use_tqdm=False,
        )
        return [_answer(output) for output in found]

    def on_workers(self, function: Callable[[Any], Any]) -> list[Any]:
        """What a function of vLLM's LoRA manager gives on each rank."""
        return list(self.llm.collective_rpc(lambda worker: function(worker.model_runner.lora_manager)))


def _answer(output: Any) -> Answer:
    said = output.outputs[0]
    chosen = [entry[token].logprob for token, entry in zip(said.token_ids, said.logprobs, strict=True)]
    pairs = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [None])[1:], strict=False)
    return Answer(list(said.token_ids), chosen, [entry[token].logprob for token, entry in pairs])


def difference(found: Answer, expected: Answer) -> float:
    """The largest difference of log-probabilities of two answers with the same tokens; those of the prompt count where
    both have them."""
    assert found.tokens == expected.tokens
    pairs = [*zip(found.logprobs, expected.logprobs, strict=True)]
    if found.prompt_logprobs:
        pairs += zip(found.prompt_logprobs, expected.prompt_logprobs, strict=True)
    return max(abs(one - other) for one, other in pairs)


def wrong_answers(questions: Sequence[Question], found: Sequence[Answer], tolerance: float = TOLERANCE) -> list[str]:
    """The questions whose answer is not that of the merged model, each with the first token that is not, or how far the
    log-probabilities are."""
    wrong = []
    for (served, index), answer in zip(questions, found, strict=True):
        expected = served.questions[index]
        name = f"{served.name} asked prompt {index}"
        if answer.tokens != expected.tokens:
            same = [one == other for one, other in zip(answer.tokens, expected.tokens, strict=True)]
            wrong.append(f"{name}: token {same.index(False)} of {COUNT} differs")
        elif (far := difference(answer, expected)) > tolerance:
            wrong.append(f"{name}: log-probabilities differ by {far:.1e}")
    return wrong


def questions_of(*served: Served, most: int = 3) -> list[Question]:
    """The first `most` questions of each."""
    return [(one, index) for one in served for index in list(one.questions)[:most]]


def woven(*parts: Sequence[Question]) -> list[Question]:
    """The questions of all parts in turn, so that the rows of none lie together."""
    return [question for several in zip(*parts, strict=True) for question in several]


def expected_bytes(model: ServedModel, *, rank: int, width: int, ranks: int = 1) -> int:
    """Bytes of a slot of all targets on one of `ranks` ranks, by the formula. `width` is a value's, but for u, which
    is in fp32 and exists for each module that vLLM fuses (phi3's are stored as one)."""
    slices = {"qkv": 3, "o_proj": 1, "gate_up": 2, "down_proj": 1}
    total, layers = 0, model.sizes.num_layers
    for target, count in slices.items():
        rows, columns = sum(model.sizes.target_rows(target)), model.sizes.target_columns(target)
        if target in ("o_proj", "down_proj"):
            columns //= ranks
        else:
            rows //= ranks
        total += width * (rank * columns + rows * rank + layers * rows)
        total += 4 * layers * rank * (1 if model.name == "phi3" else count)
    return total


def held_bytes(manager: Any) -> int:
    """Bytes of the tensors that a rank's layers hold for adapters; a storage counts once. `manager` is vLLM's."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, tuple | list):
            for each in value:
                visit(each)

    for layer in manager._adapter_manager.modules.values():
        for name, value in vars(layer).items():
            if name not in ("_parameters", "_modules", "_buffers"):  # the base's
                visit(value)
    return sum(found.values())


def forget_engines() -> None:
    """Remove what an engine that was ended, or that did not start, leaves in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def apply_environment() -> None:
    """Set what an engine of this process needs, before vLLM is imported."""
    os.environ.update(ENVIRONMENT)
