"""A client's run with the real `tinker` SDK, in its own Python: `python -m support.sdk_run URL`, the key in
TINKER_API_KEY. It prints what it saw as a line of JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import tinker
import torch
from tinker import types


def datum(tokens: list[int], targets: list[int]) -> types.Datum:
    """A datum without weights."""
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs={"target_tokens": targets})


def rejected(call: Any) -> str:
    """The message of the error of a future."""
    try:
        call.result(timeout=60)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run(url: str) -> dict[str, Any]:
    """Every call that recipes make."""
    client = tinker.ServiceClient(base_url=url)
    seen: dict[str, Any] = {"models": [one.model_name for one in client.get_server_capabilities().supported_models]}
    trainer = client.create_lora_training_client(base_model="org/base:tl6", rank=4, seed=3, train_unembed=False)
    seen["info"] = trainer.get_info().model_data.tokenizer_id
    data = [datum([1, 2, 3], [2, 3, 4]), datum([5], [6])]
    passed = trainer.forward_backward(data, "cross_entropy")
    stepped = trainer.optim_step(types.AdamParams(learning_rate=0.01))
    result = passed.result(timeout=60)
    seen["metrics"] = result.metrics
    seen["logprobs"] = [one["logprobs"].data for one in result.loss_fn_outputs]
    seen["step"] = stepped.result(timeout=60).metrics

    def loss(sent: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return sum((one**2).sum() for one in logprobs), {"mine": 1.0}

    seen["custom"] = trainer.forward_backward_custom(data, loss).result(timeout=60).metrics
    seen["rejected"] = rejected(trainer.forward_backward(data, "gspo"))
    seen["after"] = trainer.optim_step(types.AdamParams()).result(timeout=60).metrics
    path = trainer.save_state("first").result(timeout=60).path
    seen["saved"] = path.split("/")[-2:]
    seen["twice"] = rejected(trainer.save_state("first"))
    again = client.create_training_client_from_state_with_optimizer(path)
    seen["resumed"] = again.forward(data, "cross_entropy").result(timeout=60).metrics
    named = trainer.save_weights_for_sampler("last").result(timeout=60).path
    seen["run"] = client.create_rest_client().get_training_run_by_tinker_path(named).result().base_model
    sampler = trainer.save_weights_and_get_sampling_client()
    params = types.SamplingParams(max_tokens=3, seed=1, stop=["x"])
    prompt = types.ModelInput.from_ints([1, 2])
    sampled = sampler.sample(prompt, 2, params, include_prompt_logprobs=True, topk_sample_logprobs=2).result(timeout=60)
    seen["sampled"] = [[*one.tokens] for one in sampled.sequences]
    seen["prompt"] = sampled.prompt_logprobs
    seen["scored"] = client.create_sampling_client(model_path=named).compute_logprobs(prompt).result(timeout=60)
    client.close("success").result(timeout=60)
    return seen


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1]), default=float))
