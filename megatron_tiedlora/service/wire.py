"""Convert protobuf bodies into operations, and results into protobuf bodies.

Nothing in a body is trusted: the size of each array is checked before it is read, token ids are below the vocabulary's
size, and numbers are finite. A body that is rejected gives a UserError that names the field.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from google.protobuf.message import DecodeError

from megatron_tiedlora.base.messages import UserError, enumerate_names, naming, nearest_name, shown
from megatron_tiedlora.parallel.objectives import KINDS
from megatron_tiedlora.service import wire_pb2
from megatron_tiedlora.service.operations import LARGEST, Pass, PassResult, SampleResult, ServiceFacts, Top
from megatron_tiedlora.service.wire_pb2 import Datum, ForwardBackwardRequest, Tensor, TopkLogprobs

Sent = TypeVar("Sent", ForwardBackwardRequest, Datum)

_TARGETS = "target_tokens"
_FLOAT32, _BFLOAT16 = 1, 4
_DTYPES: Mapping[int, str] = {_FLOAT32: "<f4", 2: "<i8", 3: "<i4", _BFLOAT16: "<f2"}  # bfloat16: of the same size
_MOST_DATA = 2**16
_EMPTY = (0, -99999.0)  # a cell without a token


def read_pass(body: bytes) -> ForwardBackwardRequest:
    """Return the body of forward_backward. Raise UserError if it does not name its model and number."""
    sent = _parsed(ForwardBackwardRequest, body)
    if not sent.model_id or sent.seq_id < 1:
        raise UserError(f"model_id {shown(sent.model_id)} or seq_id {sent.seq_id}: is missing; numbers begin with 1")
    return sent


def pass_of(sent: ForwardBackwardRequest, facts: ServiceFacts) -> Pass:
    """Return the operation. Raise UserError if the body is inconsistent or asks for what this service cannot do."""
    if sent.loss_fn not in KINDS:
        use = f"{nearest_name(sent.loss_fn, KINDS)}. Use {enumerate_names(tuple(KINDS))}"
        raise UserError(f"loss_fn {shown(sent.loss_fn)}: is not supported by this server{use}")
    if not 0 < (count := len(sent.data)) <= _MOST_DATA:
        raise UserError(f"data: has {count:,} items; send 1 to {_MOST_DATA:,}")
    rows = []
    for index, raw in enumerate(sent.data):
        with naming(f"data[{index}]"):
            rows.append(_row(_parsed(Datum, raw), sent.loss_fn, facts))
    tokens, targets, *inputs = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*rows, strict=True))
    inputs += [torch.zeros(len(tokens))] * (2 - len(inputs))
    lengths = tuple(len(row[0]) for row in rows)
    settings, backward = _settings(sent), not sent.forward_only
    return Pass(lengths, tokens, targets, torch.stack(inputs), sent.loss_fn, settings, backward)


def _parsed(kind: type[Sent], raw: bytes) -> Sent:
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise UserError(f"is not a {kind.DESCRIPTOR.name} in protobuf; send all of it, unchanged") from None


def _settings(sent: ForwardBackwardRequest) -> dict[str, float]:
    """Return the settings of the loss. The second map of the message replaces the first one, for old servers."""
    known = KINDS[sent.loss_fn].settings
    for name, sent_value in sent.loss_fn_config_v2.items():
        if sent_value.WhichOneof("value") != "number":
            raise UserError(f"loss_fn_config: {shown(name)} = {shown(sent_value.text)} is not a number")
    settings = {name: found.number for name, found in sent.loss_fn_config_v2.items()} or dict(sent.loss_fn_config)
    for name, value in settings.items():
        if name not in known:
            takes = f"{nearest_name(name, known)}; {sent.loss_fn} takes {enumerate_names(tuple(known)) or 'none'}"
            raise UserError(f"loss_fn_config: {shown(name)} is unknown{takes}")
        if not abs(value) <= LARGEST:  # nan neither
            raise UserError(f"loss_fn_config: {name} is {value}; give a number of at most {LARGEST:g}")
    return settings


def _row(datum: Datum, objective: str, facts: ServiceFacts) -> list[np.ndarray]:
    """Return the checked arrays of a datum, (n,) each: tokens and targets in int64, the inputs of the loss in fp32."""
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise UserError(f"model_input: a chunk of type {kind} is not supported by this server; send encoded_text")
        if len(chunk.encoded_text.tokens) % 4:
            raise UserError("model_input: the tokens of a chunk are not int32")
    tokens = np.frombuffer(b"".join(chunk.encoded_text.tokens for chunk in datum.model_input), dtype="<i4")
    facts.check_tokens(tokens, "model_input")
    sent, wanted = datum.loss_fn_inputs, KINDS[objective].inputs
    for name in sent:
        if name not in (_TARGETS, *wanted):
            takes = f"{objective} takes {enumerate_names((_TARGETS, *wanted))}"
            raise UserError(f"loss_fn_inputs: {shown(name)} is unknown; {takes}")
    targets = _values(sent, _TARGETS, len(tokens), "<i8")
    facts.check_tokens(targets, _TARGETS)
    row = [tokens.astype(np.int64), targets]
    for name in wanted:
        if name == "weights" and name not in sent:  # as the service that the protocol comes from
            row.append(np.ones(len(tokens), dtype=np.float32))
        else:
            row.append(_values(sent, name, len(tokens), "<f4"))
    return row


def _values(inputs: Mapping[str, Tensor], name: str, count: int, dtype: str) -> np.ndarray:
    """Return an input of the loss as an array (count,) of `dtype`, "<i8" or "<f4". Raise UserError if it is missing,
    sparse, of another shape or kind, or not finite."""
    what = f"loss_fn_inputs[{name!r}]"
    if name not in inputs:
        raise UserError(f"{what}: is missing")
    sent = inputs[name]
    if sent.WhichOneof("encoding") == "sparse_csr" or len(sent.shape) > 1:
        raise UserError(f"{what}: sparse tensors and several dimensions are not supported; send a number per token")
    kind = _DTYPES.get(sent.dtype, "")
    if kind[:2] not in ("<i", dtype[:2]):
        raise UserError(f"{what}: has the dtype {sent.dtype}; send {'int64' if dtype == '<i8' else 'float32'}")
    size = count * np.dtype(kind).itemsize
    if list(sent.shape) not in ([], [count]) or len(sent.dense) != size:
        raise UserError(
            f"{what}: has {len(sent.dense):,} bytes and the shape {shown(list(sent.shape))}; send {size:,} bytes, a"
            f" number for each of the {count:,} tokens of model_input"
        )
    values = np.frombuffer(sent.dense, dtype="<u2" if sent.dtype == _BFLOAT16 else kind)
    if sent.dtype == _BFLOAT16:  # the upper half of a float32
        values = (values.astype("<u4") << 16).view("<f4")
    values = values.astype(dtype)
    if not np.isfinite(values).all():
        raise UserError(f"{what}: has numbers that are not finite")
    return values


# Results --------------------------------------------------------------------------------------------------------------


def pass_bytes(result: PassResult) -> bytes:
    """Return a ForwardBackwardOutput: the summed loss, and the log-probabilities of each row's targets."""
    message = wire_pb2.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics={"loss:sum": result.loss})
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(result.lengths))
    logprobs = result.logprobs.detach().cpu().numpy().astype("<f4")
    field = record.fields["logprobs"]
    field.data, field.dtype = logprobs.tobytes(), _FLOAT32
    field.offsets = (np.cumsum((0, *result.lengths), dtype="<i8") * logprobs.itemsize).tobytes()
    return message.SerializeToString()


def sample_bytes(result: SampleResult) -> bytes:
    """Return a SampleResponse."""
    message = wire_pb2.SampleResponse()
    for sequence in result.sequences:
        sent = message.sequences.add(stop_reason=0 if sequence.stopped else 1)
        sent.tokens = np.array(sequence.tokens, dtype="<i4").tobytes()
        sent.logprobs = np.array(sequence.logprobs, dtype="<f4").tobytes()
        _write_top(sent.topk_sampled_logprobs, sequence.top)
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = np.array(result.prompt_logprobs, dtype="<f4").tobytes()
    _write_top(message.topk_prompt_logprobs, result.prompt_top or ())
    return message.SerializeToString()


def _write_top(table: TopkLogprobs, rows: Sequence[Top]) -> None:
    """Write the most likely tokens of some positions as a table, whose width is the largest number at a position."""
    if width := max(map(len, rows), default=0):
        cells = np.array([[*row, *[_EMPTY] * (width - len(row))] for row in rows])  # fp64, which has all token ids
        table.token_ids, table.logprobs = cells[..., 0].astype("<i4").tobytes(), cells[..., 1].astype("<f4").tobytes()
        table.k, table.length = width, len(rows)
