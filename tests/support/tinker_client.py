"""A client of the unmodified `tinker` SDK, for the Python that TINKER_PYTHON names: it runs a script of calls.

    python tinker_client.py URL KEY SCRIPT.json RESULTS.json

The script is {"base_model", "rank", "seed", "pause", "calls"}. A call is [kind, ...]; each has an entry in the results.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any


def main(url: str, key: str, script: str, results: str) -> None:
    """Run the calls, with random pauses of up to `pause` seconds."""
    import tinker

    plan = json.loads(Path(script).read_text())
    service = tinker.ServiceClient(base_url=url, api_key=key)
    created = service.create_lora_training_client(base_model=plan["base_model"], rank=plan["rank"], seed=plan["seed"])
    model = created.result() if hasattr(created, "result") else created
    drawn, found = random.Random(plan["seed"]), list[Any]()
    for call in plan["calls"]:
        time.sleep(drawn.random() * plan["pause"])
        found.append(_run(service, model, *call))
    Path(results).write_text(json.dumps(found))


def _data(rows: list[dict[str, list[float]]]) -> list[Any]:
    from tinker import types

    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row["tokens"]),
            loss_fn_inputs={name: values for name, values in row.items() if name != "tokens"},
        )
        for row in rows
    ]


def _passed(result: Any) -> dict[str, Any]:
    logprobs = [list(output["logprobs"].data) for output in result.loss_fn_outputs]
    return {"loss": result.metrics["loss:sum"], "logprobs": logprobs}


def _run(service: Any, model: Any, kind: str, *arguments: Any) -> Any:
    from tinker import types

    if kind == "step":  # a pass and the step behind it are both sent before either is answered
        rows, loss, settings, numbers = arguments
        passed = model.forward_backward(_data(rows), loss, settings or None)
        stepped = model.optim_step(types.AdamParams(**numbers))
        return {**_passed(passed.result()), "metrics": stepped.result().metrics}
    if kind == "custom":  # (lp + 2)^2, by a function of the client
        rows, numbers = arguments

        def squares(_: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
            return sum((own + 2).square().sum() for own in logprobs), {}

        passed = model.forward_backward_custom(_data(rows), squares)
        stepped = model.optim_step(types.AdamParams(**numbers))
        return {**_passed(passed.result()), "metrics": stepped.result().metrics}
    if kind == "save":
        return model.save_state(arguments[0]).result().path
    if kind == "sample":
        made = model.save_weights_and_get_sampling_client()
        sampler = made.result() if hasattr(made, "result") else made
        params = types.SamplingParams(max_tokens=8, seed=3, temperature=1.0, top_k=50, top_p=0.95)
        found = sampler.sample(types.ModelInput.from_ints(arguments[0]), num_samples=2, sampling_params=params).result()
        return [[list(one.tokens), list(one.logprobs)] for one in found.sequences]
    assert kind == "fails", kind
    passed = model.forward_backward(_data(arguments[0]), arguments[1])
    return [_error(passed), _error(model.optim_step(types.AdamParams(learning_rate=1.0)))]


def _error(future: Any) -> str:
    """What the SDK says of an operation that fails, without its number."""
    try:
        future.result()
    except tinker_error() as error:
        return str(error).partition(" for self.request_id")[0]
    raise AssertionError("the operation did not fail")


def tinker_error() -> type[Exception]:
    """The SDK's error of a failed operation."""
    import tinker

    return tinker.RequestFailedError


if __name__ == "__main__":
    main(*sys.argv[1:])
