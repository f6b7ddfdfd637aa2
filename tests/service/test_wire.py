"""Passes in protobuf, as the real client sends them, and what is rejected of them; results in protobuf."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.service_facts import FACTS

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.service.operations import Pass, PassResult, Sampled, SampleResult
from megatron_tiedlora.service.wire import pass_bytes, pass_of, read_pass, sample_bytes
from megatron_tiedlora.service.wire_pb2 import Datum, ForwardBackwardOutput, ForwardBackwardRequest, SampleResponse

# The output of tests/support/sdk_messages.py with tinker 0.38.0, in pieces.
RECORDED = {
    "cross_entropy": (
        "0a0a73313a747261696e3a3010071a6a0a080a060a04050000000a0c0a0a0a08060000000700000012300a0d746172676574"
        "5f746f6b656e73121f0a180600000000000000070000000000000008000000000000001802220103121e0a07776569676874"
        "7312130a0c000000000000803f0000003f18012201031a2c0a080a060a040100000012200a0d7461726765745f746f6b656e"
        "73120f0a0802000000000000001802220101220d63726f73735f656e74726f7079"
    ),
    "ppo": (
        "0a0a73313a747261696e3a3010071a740a0c0a0a0a080200000003000000121d0a0a616476616e7461676573120f0a080000"
        "803f000000c01801220102121b0a086c6f6770726f6273120f0a08000000bf0000c0bf180122010212280a0d746172676574"
        "5f746f6b656e7312170a10030000000000000004000000000000001802220102220370706f2a1d0a12636c69705f6c6f775f"
        "7468726573686f6c6411666666666666e63f30013a1f0a12636c69705f6c6f775f7468726573686f6c641209096666666666"
        "66e63f"
    ),
    "text": (
        "0a0a73313a747261696e3a3010071a740a0c0a0a0a080200000003000000121d0a0a616476616e7461676573120f0a080000"
        "803f000000c01801220102121b0a086c6f6770726f6273120f0a08000000bf0000c0bf180122010212280a0d746172676574"
        "5f746f6b656e7312170a10030000000000000004000000000000001802220102220370706f3a1b0a12636c69705f6c6f775f"
        "7468726573686f6c64120512036c6f77"
    ),
    "unknown_setting": (
        "0a0a73313a747261696e3a3010071a740a0c0a0a0a080200000003000000121d0a0a616476616e7461676573120f0a080000"
        "803f000000c01801220102121b0a086c6f6770726f6273120f0a08000000bf0000c0bf180122010212280a0d746172676574"
        "5f746f6b656e7312170a10030000000000000004000000000000001802220102220370706f2a130a08636c69705f6c6f7711"
        "666666666666e63f3a150a08636c69705f6c6f77120909666666666666e63f"
    ),
    "stable_reinforce": (
        "0a0a73313a747261696e3a3010071a740a0c0a0a0a080200000003000000121d0a0a616476616e7461676573120f0a080000"
        "803f000000c01801220102121b0a086c6f6770726f6273120f0a08000000bf0000c0bf180122010212280a0d746172676574"
        "5f746f6b656e7312170a100300000000000000040000000000000018022201022210737461626c655f7265696e666f726365"
    ),
    "two_dimensions": (
        "0a0a73313a747261696e3a3010071a4d0a080a060a040200000012290a0d7461726765745f746f6b656e7312180a10010000"
        "0000000000020000000000000018022202010212160a0777656967687473120b0a040000803f1801220101220d63726f7373"
        "5f656e74726f7079"
    ),
    "sparse": (
        "0a0a73313a747261696e3a3010071ab3010a180a160a14020000000200000002000000020000000200000012400a0d746172"
        "6765745f746f6b656e73122f0a28010000000000000001000000000000000100000000000000010000000000000001000000"
        "00000000180222010512550a0777656967687473124a12420a040000803f1230000000000000000000000000000000000100"
        "0000000000000100000000000000010000000000000001000000000000001a080100000000000000180122020502220d6372"
        "6f73735f656e74726f7079"
    ),
    "image": (
        "0a0a73313a747261696e3a3010071a300a0c120a0a01781203706e67180112200a0d7461726765745f746f6b656e73120f0a"
        "0801000000000000001802220101220d63726f73735f656e74726f7079"
    ),
}


def recorded(name: str) -> bytes:
    return bytes.fromhex(RECORDED[name])


def operation_in(body: bytes) -> Pass:
    return pass_of(read_pass(body), FACTS)


def test_a_pass_of_the_client_has_its_rows_in_order() -> None:
    sent = read_pass(recorded("cross_entropy"))
    found = pass_of(sent, FACTS)
    assert (sent.model_id, sent.seq_id) == ("s1:train:0", 7)
    assert found.lengths == (3, 1) and found.backward and found.objective == "cross_entropy" and not found.settings
    assert found.tokens.tolist() == [5, 6, 7, 1] and found.targets.tolist() == [6, 7, 8, 2]  # row 1 is sent in chunks
    assert found.inputs.tolist() == [[0.0, 1.0, 0.5, 1.0], [0.0] * 4]  # the second row has no weights
    assert (found.tokens.dtype, found.targets.dtype, found.inputs.dtype) == (torch.int64, torch.int64, torch.float32)


def test_a_pass_of_samples_has_the_numbers_of_its_loss() -> None:
    found = operation_in(recorded("ppo"))
    assert found.inputs.tolist() == [[-0.5, -1.5], [1.0, -2.0]] and not found.backward
    assert dict(found.settings) == {"clip_low_threshold": 0.7}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", "'clip_low_threshold' = 'low' is not a number"),
        ("unknown_setting", "'clip_low' is unknown (did you mean clip_low_threshold?)"),
        ("stable_reinforce", "'stable_reinforce': is not supported by this server"),
        ("two_dimensions", "data[0]: loss_fn_inputs['target_tokens']: sparse tensors and several dimensions"),
        ("sparse", "data[0]: loss_fn_inputs['weights']: sparse tensors and several dimensions"),
        ("image", "data[0]: model_input: a chunk of type image is not supported"),
    ],
)
def test_what_is_not_supported_is_rejected_by_name(name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        operation_in(recorded(name))
    assert said in str(caught.value)


class Sent:
    """A pass of two tokens, and its datum."""

    def __init__(self) -> None:
        self.message = ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
        self.datum: Datum | None = written()

    def read(self) -> Pass:
        """What becomes of it."""
        self.message.ClearField("data")
        if self.datum is not None:
            self.message.data.append(self.datum.SerializeToString())
        return operation_in(self.message.SerializeToString())


def written() -> Datum:
    """A datum of two tokens."""
    datum = Datum()
    datum.model_input.add().encoded_text.tokens = np.array([1, 2], dtype="<i4").tobytes()
    for name, kind, values in (("target_tokens", 2, "<i8"), ("weights", 1, "<f4")):
        tensor = datum.loss_fn_inputs[name]
        tensor.dtype, tensor.dense = kind, np.array([2, 3], dtype=values).tobytes()
    return datum


def weights(sent: Any) -> Any:
    return sent.datum.loss_fn_inputs["weights"]


def targets(sent: Any) -> Any:
    return sent.datum.loss_fn_inputs["target_tokens"]


def text(sent: Any) -> Any:
    return sent.datum.model_input[0].encoded_text


def become_dro(sent: Any) -> None:
    """Give the pass the loss dro."""
    sent.message.loss_fn = "dro"
    for name in ("logprobs", "advantages"):
        sent.datum.loss_fn_inputs[name].CopyFrom(weights(sent))
    del sent.datum.loss_fn_inputs["weights"]


FAULTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "no data": (lambda sent: setattr(sent, "datum", None), "data: has 0 items; send 1 to 65,536"),
    "no tokens": (lambda sent: sent.datum.ClearField("model_input"), "model_input: has 0 tokens; send 1 to 64"),
    "too long": (lambda sent: setattr(text(sent), "tokens", bytes(4 * 65)), "model_input: has 65 tokens"),
    "half a token": (lambda sent: setattr(text(sent), "tokens", b"abc"), "the tokens of a chunk are not int32"),
    "negative": (lambda sent: setattr(text(sent), "tokens", b"\xff" * 8), "model_input: -1 is not a token of"),
    "too large": (lambda sent: setattr(targets(sent), "dense", (100).to_bytes(8, "little") * 2), "100 is not a token"),
    "no targets": (lambda sent: sent.datum.loss_fn_inputs.pop("target_tokens"), "['target_tokens']: is missing"),
    "float targets": (lambda sent: setattr(targets(sent), "dtype", 1), "has the dtype 1; send int64"),
    "no dtype": (lambda sent: setattr(weights(sent), "dtype", 0), "has the dtype 0; send float32"),
    "unknown dtype": (lambda sent: setattr(weights(sent), "dtype", 99), "has the dtype 99; send float32"),
    "short": (lambda sent: setattr(weights(sent), "dense", b"1234"), "has 4 bytes and the shape []; send 8 bytes"),
    "long": (lambda sent: setattr(weights(sent), "dense", b"1234" * 3), "has 12 bytes and the shape []; send 8 bytes"),
    "shape": (lambda sent: weights(sent).shape.append(2**62), "the shape [4611686018427387904]"),
    "negative shape": (lambda sent: weights(sent).shape.append(-2), "the shape [-2]"),
    "nan": (lambda sent: setattr(weights(sent), "dense", b"\0\0\xc0\x7f" * 2), "numbers that are not finite"),
    "unknown input": (lambda sent: sent.datum.loss_fn_inputs["mask"], "'mask' is unknown; cross_entropy takes"),
    "setting": (
        lambda sent: sent.message.loss_fn_config.update({"beta": 1.0}),
        "loss_fn_config: 'beta' is unknown; cross_entropy takes none",
    ),
    "infinite": (
        lambda sent: (become_dro(sent), sent.message.loss_fn_config.update({"beta": float("inf")})),
        "loss_fn_config: beta is inf; give a number of at most 1e+30",
    ),
    "no number": (lambda sent: sent.message.ClearField("seq_id"), "seq_id 0: is missing"),
    "no model": (lambda sent: sent.message.ClearField("model_id"), "model_id '' or seq_id 1: is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_inconsistent_pass_is_rejected(fault: str) -> None:
    sent = Sent()
    assert sent.read().lengths == (2,)
    change, said = FAULTS[fault]
    change(sent)
    with pytest.raises(UserError) as caught:
        sent.read()
    assert said in str(caught.value)


def test_numbers_are_read_in_every_dtype() -> None:
    sent = Sent()
    for kind, dtype in ((1, "<f4"), (2, "<i8"), (3, "<i4")):
        weights(sent).dtype, weights(sent).dense = kind, np.array([3, -2], dtype=dtype).tobytes()
        assert sent.read().inputs[0].tolist() == [3.0, -2.0]
    weights(sent).dtype, weights(sent).dense = 4, (np.array([1.5, -2], "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    targets(sent).dtype, targets(sent).dense = 3, np.array([4, 5], dtype="<i4").tobytes()
    found = sent.read()
    assert found.inputs[0].tolist() == [1.5, -2.0] and found.targets.tolist() == [4, 5]


def test_broken_bytes_give_one_error_or_a_pass() -> None:
    """Every prefix of a body, and bodies with changed bytes: a UserError, or a pass whose arrays agree."""
    whole, draw = recorded("cross_entropy"), random.Random(1)
    bodies = [whole[:length] for length in range(len(whole))]
    for _ in range(2000):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        bodies.append(bytes(changed))
    passes = 0
    for body in bodies:
        try:
            found = operation_in(body)
        except UserError:
            continue
        passes += 1
        assert sum(found.lengths) == len(found.tokens) == len(found.targets) == found.inputs.shape[1]
        assert found.tokens.min() >= 0 and found.tokens.max() < FACTS.vocab_size and found.inputs.isfinite().all()
    assert passes  # some changes are numbers that may be there


def test_a_result_has_the_log_probabilities_of_each_row() -> None:
    body = pass_bytes(PassResult(2.5, (3, 1), torch.tensor([-1.0, -2.0, -3.0, -4.0])))
    found = ForwardBackwardOutput.FromString(body)
    assert dict(found.metrics) == {"loss:sum": 2.5}
    (record,) = found.loss_fn_outputs
    field = record.fields["logprobs"]
    assert record.num_datums == 2 and np.frombuffer(field.offsets, "<i8").tolist() == [0, 12, 16]
    assert np.frombuffer(field.data, "<f4").tolist() == [-1.0, -2.0, -3.0, -4.0]


def test_samples_have_tables_of_likely_tokens_with_empty_cells() -> None:
    one = Sampled((7, 8), (-0.5, -0.25), True, (((7, -0.5), (1, -2.0)), ((8, -0.25),)))
    two = Sampled((), (), False, ())
    body = sample_bytes(SampleResult((one, two), (float("nan"), -1.0), None))
    found = SampleResponse.FromString(body)
    assert [sequence.stop_reason for sequence in found.sequences] == [0, 1]
    assert np.frombuffer(found.sequences[0].tokens, "<i4").tolist() == [7, 8]
    table = found.sequences[0].topk_sampled_logprobs
    assert (table.k, table.length) == (2, 2)
    assert np.frombuffer(table.token_ids, "<i4").tolist() == [7, 1, 8, 0]
    assert np.frombuffer(table.logprobs, "<f4").tolist() == [-0.5, -2.0, -0.25, -99999.0]
    assert not found.sequences[1].HasField("topk_sampled_logprobs") and not found.HasField("topk_prompt_logprobs")
    assert np.isnan(np.frombuffer(found.prompt_logprobs, "<f4")).tolist() == [True, False]
