"""Write protobuf bodies with the real `tinker` SDK, as lines NAME HEX: `python -m support.sdk_messages` in its Python.

tests/service/test_wire.py has the output, so that it runs without the SDK.
"""

from __future__ import annotations

import numpy as np
import tinker
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto


def body(data: list[types.Datum], loss: str, config: dict[str, float | str] | None, *, forward: bool = False) -> str:
    """The bytes that the SDK sends for a pass of model m1 with number 7."""
    inputs = types.ForwardBackwardInput(data=data, loss_fn=loss, loss_fn_config=config)
    message = forward_backward_request_to_proto(
        types.ForwardBackwardRequest(forward_backward_input=inputs, model_id="s1:train:0", seq_id=7)
    )
    message.forward_only = forward
    return message.SerializeToString(deterministic=True).hex()


def datum(tokens: list[int], **inputs: object) -> types.Datum:
    """A datum of tokens."""
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def main() -> None:
    """Print the bodies."""
    split = types.ModelInput.from_ints([5]).append(types.EncodedTextChunk(tokens=[6, 7]))
    weighted = types.Datum(model_input=split, loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [0.0, 1.0, 0.5]})
    sampled = {"target_tokens": [3, 4], "logprobs": [-0.5, -1.5], "advantages": [1.0, -2.0]}
    soft = np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    print("cross_entropy", body([weighted, datum([1], target_tokens=[2])], "cross_entropy", None))
    print("ppo", body([datum([2, 3], **sampled)], "ppo", {"clip_low_threshold": 0.7}, forward=True))
    print("text", body([datum([2, 3], **sampled)], "ppo", {"clip_low_threshold": "low"}))
    print("unknown_setting", body([datum([2, 3], **sampled)], "ppo", {"clip_low": 0.7}))
    print("stable_reinforce", body([datum([2, 3], **sampled)], "stable_reinforce", None))
    print("two_dimensions", body([datum([2], target_tokens=np.array([[1, 2]]), weights=[1.0])], "cross_entropy", None))
    print("sparse", body([datum([2] * 5, target_tokens=[1] * 5, weights=_sparse(soft))], "cross_entropy", None))
    image = types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png", expected_tokens=1)])
    print("image", body([types.Datum(model_input=image, loss_fn_inputs={"target_tokens": [1]})], "cross_entropy", None))
    print("version", tinker.__version__)


def _sparse(dense: np.ndarray) -> types.TensorData:
    """A matrix with one number, in the sparse format."""
    return types.TensorData(
        data=[1.0], dtype="float32", shape=list(dense.shape), sparse_crow_indices=[0, 0, 1, 1, 1, 1],
        sparse_col_indices=[1],
    )  # fmt: skip


if __name__ == "__main__":
    main()
