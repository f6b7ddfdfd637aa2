"""Lets vLLM generate the answers of `tiedlora evaluate --engine vllm`, with native adapters, exports or a model alone.

vLLM gets and returns token ids, so that prompts, end tokens and texts are those of every evaluation. The plugin of this
package loads native adapters. vLLM is imported only when it is started.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base.messages import UserError, user_path
from megatron_tiedlora.convert import serving
from megatron_tiedlora.evaluation.answering import BATCHES_AT_ONCE, Answerer, ScoredSet
from megatron_tiedlora.evaluation.generate import Agree, Endings, Prompts, RowSettings
from megatron_tiedlora.evaluation.plan import EvaluationPlans
from megatron_tiedlora.integrations.vllm.factors import ServedAdapter, check_served, is_plain_lora, read_unloaded
from megatron_tiedlora.integrations.vllm.serve import plugin_variables, slots_for
from megatron_tiedlora.parallel.shard_spec import stream_seed

# `is_end`, which vLLM cannot call, is tested after this many new tokens, then after twice as many, and so on.
_FIRST_TOKENS = 16


class VllmAnswerer(Answerer):
    """A model in vLLM, in this process and in those that vLLM starts. Greedy answers are those of this package, but for
    rounding. Samples are others: vLLM's own, from a seed for each row, which is a hash of --seed and its index."""

    def __init__(self, plans: EvaluationPlans, scored: Mapping[str, ScoredSet]) -> None:
        """Start vLLM with room for the longest sample. Raise UserError if it cannot serve the model or an adapter."""
        self.is_last, plan = True, next(iter(plans.values()))
        shape = plan.source.shape
        longest, limit = max(map(_longest, scored.values())), shape.limit
        if longest > limit.tokens:
            said = f"--engine vllm: a sample has {longest} tokens, and the model {limit.reason}"
            raise UserError(f"{said}; lower --max_length")
        folders = {n: user_path(given).absolute() for n, own in plans.items() if (given := own.settings.adapter)}
        options: dict[str, Any] = {"model": str(plan.source.weights_folder()), "max_model_len": longest}
        options |= {"dtype": str(plan.dtype).removeprefix("torch."), "tensor_parallel_size": plan.grid.tp_size}
        options |= {"max_num_seqs": plan.settings.batch_size, "seed": plan.settings.seed}
        options["generation_config"] = "vllm"  # the folder's own may have sampling parameters
        # The folder's tokenizer is not used here, but vLLM's processors of images need it.
        options["skip_tokenizer_init"] = plan.settings.tokenizer is not None and not shape.block.is_tower
        options |= _lora_options(plans, folders) if folders else {}
        os.environ.update(plugin_variables())
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process may have asked for GPUs
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        self._parameters: Any = SamplingParams
        try:
            self._llm: Any = LLM(**options)
        except ValueError as error:
            raise UserError(f"--engine vllm: {error}") from None
        numbered = enumerate(folders.items(), start=1)
        self._requests = {n: LoRARequest(n or folder.name, number, str(folder)) for number, (n, folder) in numbered}

    def generate(self, given: Sequence[Prompts], *, agree: Agree = bool) -> list[list[list[int]]]:
        """Return the new tokens of each prompt of each adapter. vLLM's cache of prefixes keeps the earlier ones."""
        answers: list[list[list[int]]] = [[[] for _ in some.prompts] for some in given]
        rows = ((some, row, new) for some, own in zip(given, answers, strict=True) for row, new in enumerate(own))
        left = [(some.adapter, some.prompts[row], some.settings[row], new) for some, row, new in rows]
        while left:
            asked = [([*prompt, *new], adapter) for adapter, prompt, _, new in left]
            outputs = self._ask(asked, [self._next_tokens(own, new) for *_, own, new in left])
            pairs = zip(left, outputs, strict=True)
            left = [one for one, output in pairs if not _extend(one[3], output.outputs[0].token_ids, one[2])]
            agree(not left)
        return answers

    def score(self, samples: Sequence[Endings], *, adapter: str = ONLY) -> list[list[float]]:
        """Return the summed log-likelihoods of the endings of each sample, from vLLM's log-probabilities of prompts."""
        asked = [([*prompt, *ending], adapter) for prompt, endings in samples for ending in endings]
        parameters = self._parameters(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = iter(self._ask(asked, [parameters] * len(asked)))

        def total(start: int, ending: Sequence[int]) -> float:
            entries = zip(ending, next(outputs).prompt_logprobs[start:], strict=True)
            return sum(entry[token].logprob for token, entry in entries)

        return [[total(len(prompt), ending) for ending in endings] for prompt, endings in samples]

    def close(self) -> None:
        """End vLLM's processes and free its memory."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _ask(self, asked: Sequence[tuple[list[int], str]], parameters: Sequence[Any]) -> list[Any]:
        requests = [self._requests.get(adapter) for _, adapter in asked]
        for name in dict.fromkeys(adapter for _, adapter in asked if adapter in self._requests):
            self._llm.llm_engine.add_lora(self._requests[name])  # vLLM would hang on an error while it generates
        prompts, shows = [{"prompt_token_ids": ids} for ids, _ in asked], sys.stderr.isatty()
        return list(self._llm.generate(prompts, list(parameters), lora_request=requests, use_tqdm=shows))

    def _next_tokens(self, own: RowSettings, new: Sequence[int]) -> Any:
        """Return vLLM's parameters for the next tokens of a row that has `new` ones, until the next test of its end."""
        count, how = own.max_new_tokens - len(new), own.sampling
        if own.is_end is not RowSettings.is_end:
            count = min(count, max(len(new), _FIRST_TOKENS))
        options: dict[str, Any] = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}
        if how.temperature:
            options["seed"] = stream_seed(how.seed, f"sampling.{own.number}.{len(new)}")
        options |= {"ignore_eos": True, "stop_token_ids": sorted(own.end_ids)}  # which include the tokenizer's EOS
        return self._parameters(**options, max_tokens=count, detokenize=False)


def _longest(scored: ScoredSet) -> int:
    """Return the largest number of tokens of a sequence: a prompt with its answer, or with an ending and one token."""
    lengths = ([scored.max_new_tokens, *(len(ending) + 1 for ending in own)] for own in scored.endings)
    return max(len(prompt) + max(own) for prompt, own in zip(scored.prompts, lengths, strict=True))


def _lora_options(plans: EvaluationPlans, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return the options of vLLM for these adapters. Raise UserError if it cannot serve one of them."""
    source = next(iter(plans.values())).source
    opened = {folders[name]: own.adapter for name, own in plans.items() if own.adapter}
    served = {f: read_unloaded(f, source) if is_plain_lora(f) else ServedAdapter(source, a) for f, a in opened.items()}
    if why := serving.why_no_lora(source.shape):
        raise UserError(f"--engine vllm: {why}")
    for folder, one in served.items():
        check_served(folder, one, source, max_rank=serving.VLLM_RANKS[-1], only_tied=False)
    _, config, targets, rank = slots_for([*served.values()], source)
    slots = min(len(served), BATCHES_AT_ONCE)
    sizes = {"enable_lora": True, "max_lora_rank": rank, "max_loras": slots, "max_cpu_loras": slots}
    return {**sizes, "lora_target_modules": serving.vllm_modules(targets), "additional_config": config}


def _extend(new: list[int], tokens: Sequence[int], own: RowSettings) -> bool:
    """Append tokens to the answer `new` until it ends. Return whether it has. Raise RuntimeError if there are none."""
    if not tokens:
        raise RuntimeError("vLLM returned no token; its own messages may say why")
    for token in tokens:
        if token in own.end_ids:
            return True
        new.append(token)
        if own.is_end(new):
            return True
    return len(new) >= own.max_new_tokens
