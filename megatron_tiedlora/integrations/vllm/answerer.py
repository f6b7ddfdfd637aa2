"""Lets vLLM generate the answers of `tiedlora evaluate --engine vllm`: native adapters, exports, or a model alone.

vLLM gets token ids and returns token ids, so that prompts, end tokens and texts are those of every evaluation. It loads
native adapters with the plugin of this package. vLLM is imported only when a model is loaded.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base.messages import UserError, user_path
from megatron_tiedlora.convert import serving
from megatron_tiedlora.evaluation.answering import BATCHES_AT_ONCE, ScoredSet
from megatron_tiedlora.evaluation.generate import Agree, Prompts, Sample
from megatron_tiedlora.evaluation.plan import EvaluationPlan, EvaluationPlans
from megatron_tiedlora.integrations.vllm.factors import ServedAdapter, check_served
from megatron_tiedlora.integrations.vllm.serve import plugin_variables, slot_config, slots_for
from megatron_tiedlora.parallel.shard_spec import stream_seed

# `is_end` is tested after this many new tokens, then after twice as many, and so on, since vLLM cannot call it. vLLM's
# cache of prefixes keeps what was computed.
_FIRST_TOKENS = 16


class VllmAnswerer:
    """A model in vLLM, in this process and in those that vLLM starts. See `answering.Answerer`."""

    is_last = True

    def __init__(self, plans: EvaluationPlans, scored: Mapping[str, ScoredSet]) -> None:
        """Start vLLM, with enough room for the longest of the samples.

        Raises:
            UserError: vLLM cannot serve the model or an adapter, or rejects an option.
        """
        plan = self._plan = next(iter(plans.values()))
        longest = max(_longest(one) for one in scored.values())
        if longest > (limit := plan.source.shape.limit.tokens):
            raise UserError(f"--engine vllm: a prompt and its ending have {longest} tokens, of at most {limit}")
        adapters = {name: own for name, own in plans.items() if own.adapter is not None}
        options = {
            "model": str(plan.source.weights_folder()),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "tensor_parallel_size": plan.grid.tp_size,
            "max_model_len": longest,
            "seed": plan.settings.seed,
            "generation_config": "vllm",  # the folder's own has sampling parameters
            # The folder's tokenizer is not used here, but vLLM's processors of images need it.
            "skip_tokenizer_init": plan.settings.tokenizer is not None and not plan.source.shape.block.is_tower,
            **({"max_num_seqs": plan.batch_size} if plan.batch_size else {}),
            **(_lora_options(adapters) if adapters else {}),
        }
        os.environ.update(plugin_variables())
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process may have asked for GPUs
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        self._parameters: Any = SamplingParams
        try:
            self._llm: Any = LLM(**options)
        except ValueError as error:
            raise UserError(f"--engine vllm: {error}") from None
        self._requests: dict[str, Any] = {
            name: LoRARequest(name or own.adapter_name, number, str(user_path(own.settings.adapter or "").absolute()))
            for number, (name, own) in enumerate(adapters.items(), start=1)
        }

    def generate(self, given: Sequence[Prompts], *, agree: Agree = bool) -> list[list[list[int]]]:
        """Continue each prompt as `evaluation.generate.generate` does. vLLM samples from a request's own seed, which
        is a hash of --seed, the row and the position; they are other samples than this package's."""
        answers: list[list[list[int]]] = [[[] for _ in some.prompts] for some in given]
        left = [(some, row, new) for some, own in zip(given, answers, strict=True) for row, new in enumerate(own)]
        while left:
            asked = [([*some.prompts[row], *new], some.adapter) for some, row, new in left]
            outputs = self._ask(asked, [self._next_tokens(*one) for one in left])
            pairs = zip(left, outputs, strict=True)
            left = [one for one, output in pairs if not _extend(one[2], output.outputs[0].token_ids, one[0])]
            agree(not left)
        return answers

    def score(self, samples: Sequence[Sample], *, adapter: str = ONLY) -> list[list[float]]:
        """Return log-likelihoods as `ending_log_likelihoods` does, from vLLM's log-probabilities of prompts."""
        asked = [([*prompt, *ending], adapter) for prompt, endings in samples for ending in endings]
        starts = [len(prompt) for prompt, endings in samples for _ in endings]
        parameters = self._parameters(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._ask(asked, [parameters] * len(asked))
        found = iter(
            sum(entry[token].logprob for token, entry in zip(ids[start:], output.prompt_logprobs[start:], strict=True))
            for (ids, _), start, output in zip(asked, starts, outputs, strict=True)
        )
        return [[next(found) for _ in endings] for _, endings in samples]

    def close(self) -> None:
        """End vLLM's processes and free its memory."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _ask(self, asked: Sequence[tuple[list[int], str]], parameters: Sequence[Any]) -> list[Any]:
        requests = [self._requests.get(adapter) for _, adapter in asked]
        for request in {one.lora_int_id: one for one in requests if one is not None}.values():
            self._llm.llm_engine.add_lora(request)  # in a step, an adapter that cannot be loaded would hang
        prompts = [{"prompt_token_ids": ids} for ids, _ in asked]
        return list(self._llm.generate(prompts, list(parameters), lora_request=requests, use_tqdm=False))

    def _next_tokens(self, some: Prompts, row: int, new: Sequence[int]) -> Any:
        """Return vLLM's parameters for the next tokens of a row that has `new` ones, until the next test of its end."""
        sampling, count = self._plan.sampling, some.max_new_tokens - len(new)
        if some.is_end is not Prompts.is_end:
            count = min(count, max(len(new), _FIRST_TOKENS))
        options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.temperature:
            options["seed"] = stream_seed(sampling.seed, f"sampling.{some.numbers[row]}.{len(new)}")
        options |= {"ignore_eos": True, "stop_token_ids": sorted(some.end_ids)}  # which have the tokenizer's EOS
        return self._parameters(**options, max_tokens=count, detokenize=False)


def _longest(scored: ScoredSet) -> int:
    """Return the largest number of tokens of a sequence: a prompt with its answer, or with an ending and one token."""
    endings = zip(scored.prompts, scored.endings, strict=True)
    with_ending = (len(prompt) + max(map(len, own)) + 1 for prompt, own in endings if own)
    return max(max(map(len, scored.prompts)) + scored.max_new_tokens, *with_ending, 0)


def _lora_options(plans: Mapping[str, EvaluationPlan]) -> dict[str, Any]:
    """Return the options of vLLM for these adapters. Raise UserError if vLLM cannot serve one of them."""
    source, found = next(iter(plans.values())).source, list[ServedAdapter]()
    if why := serving.why_no_lora(source.shape):
        raise UserError(f"--engine vllm: {why}")
    for plan in plans.values():
        assert plan.adapter is not None
        found.append(ServedAdapter(source, plan.adapter))
        folder = user_path(plan.settings.adapter or "")
        check_served(folder, found[-1], source, max_rank=serving.VLLM_RANKS[-1], only_tied=False)
    kind, targets, rank = slots_for(found, source)
    slots = min(len(plans), BATCHES_AT_ONCE)
    return {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": slots,
        "max_cpu_loras": slots,
        "lora_target_modules": serving.vllm_modules(targets),
        "additional_config": slot_config(kind),
    }


def _extend(new: list[int], tokens: Sequence[int], some: Prompts) -> bool:
    """Append tokens to the answer `new` until it ends. Return whether it has ended."""
    for token in tokens:
        if token in some.end_ids:
            return True
        new.append(token)
        if some.is_end(new):
            return True
    return len(new) >= some.max_new_tokens
