"""The JSON bodies of a training service, and the operations that they ask for.

A field that is unknown here is ignored if it asks for nothing (null, false, 0, empty), because new releases of the
client send such fields. Otherwise it is rejected by name: an error is better than a setting without effect.
"""

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_tiedlora.base.files import first_problem
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, QKV
from megatron_tiedlora.service.operations import LARGEST, Create, Sample, ServiceFacts, Step

_Text = Annotated[str, Field(strict=True, min_length=1, max_length=256)]
_Number = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_Top = Annotated[_Count, Field(le=20)]  # a number of most likely tokens
_Large = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Real = Annotated[float, Field(strict=True, ge=0, le=LARGEST, allow_inf_nan=False)]
_Beta = Annotated[_Real, Field(lt=1)]
_Metadata = Mapping[str, Any] | None
_MOST_METADATA = 2**14  # characters


class Body(BaseModel):
    """A JSON body. `type` repeats the endpoint's name."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    type: str = ""

    @model_validator(mode="after")
    def _check_unknown(self) -> "Body":
        for name, value in (self.model_extra or {}).items():
            if value not in (None, False, 0, "", [], {}):
                raise ValueError(f"the field {shown(name)} = {shown(value)} is not supported by this server; omit it")
        return self


class OperationId(BaseModel):
    """What bodies of a model's operations begin with. It is read first, as a rejected operation has a number too."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: _Text
    seq_id: _Number


BodyKind = TypeVar("BodyKind", bound=BaseModel)


def read_body(raw: bytes, kind: type[BodyKind]) -> BodyKind:
    """Return the JSON body of type `kind`. Raise UserError with the first problem."""
    content = read_json(raw)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(first_problem(error).removeprefix(f" = {shown(content)}: value error, ")) from None


def read_json(raw: bytes) -> dict[str, Any]:
    """Return a JSON object. Raise UserError if the body is not one."""
    try:
        content = json.loads(raw)
        json.dumps(content, ensure_ascii=False).encode()  # raises an error for half a surrogate pair
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"the body is not valid JSON ({reason})") from None
    if not isinstance(content, dict):
        raise UserError("the body is not a JSON object")
    return content


def read_name(raw: bytes, field: str) -> str:
    """Return the name in a body that only names something. Raise UserError if there is none."""
    name = read_json(raw).get(field)
    if not isinstance(name, str) or not name:
        raise UserError(f"{field} = {shown(name)}: is not a name")
    return name


# Sessions and models --------------------------------------------------------------------------------------------------


class CreateSession(Body):
    """Open a session. Tags, project, display name and metadata describe it, and have no effect here."""

    tags: list[str] = []
    user_metadata: _Metadata = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class LoraShape(Body):
    """The adapter of a new model. The head is never trained, which `create_session` tells the client."""

    rank: _Number
    seed: _Large | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(Body):
    """Create a model in a session."""

    session_id: _Text
    model_seq_id: _Count
    base_model: _Text
    user_metadata: _Metadata = None
    lora_config: LoraShape
    optimizer_config: Mapping[str, Literal["adamw"]] = {}

    def operation(self, facts: ServiceFacts) -> Create:
        """Return the operation. Raise UserError for a model that this service cannot train."""
        shape = self.lora_config
        if not shape.train_attn and not shape.train_mlp:
            raise UserError("lora_config: train_attn and train_mlp are false, so nothing is trained; set one of them")
        return Create(
            method=facts.method_of(self.base_model, self.user_metadata),
            rank=shape.rank,
            alpha=facts.alpha,
            targets=(QKV, OUTPUT) * shape.train_attn + (GATE_UP, DOWN) * shape.train_mlp,
            seed=facts.seed if shape.seed is None else shape.seed,
        )


def described(metadata: _Metadata) -> dict[str, str]:
    """Return a client's metadata as strings, by key. Raise UserError if there is too much of it."""
    found = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    if (size := sum(len(key) + len(value) for key, value in found.items())) > _MOST_METADATA:
        raise UserError(f"user_metadata: has {size:,} characters; send {_MOST_METADATA:,} at most")
    return found


class AdamParams(Body):
    """The numbers of a step of AdamW."""

    learning_rate: Annotated[_Real, Field(le=1e6)] = 1e-4  # AdamW divides it by 1 - beta1, within fp32
    beta1: _Beta = 0.9
    beta2: _Beta = 0.95
    eps: _Real = 1e-12
    weight_decay: _Real = 0.0
    grad_clip_norm: _Real = 0.0


class OptimStep(Body):
    """Take a step. Other optimizers send `optimizer_params`, which is rejected as an unknown field."""

    model_id: _Text
    seq_id: _Number
    adam_params: AdamParams = AdamParams()

    def operation(self) -> Step:
        """Return the operation."""
        sent = self.adam_params
        return Step(sent.learning_rate, sent.beta1, sent.beta2, sent.eps, sent.weight_decay, sent.grad_clip_norm)


class SaveWeights(Body):
    """Save a model under the name `path`. Without a name a new sampling session has the weights."""

    model_id: _Text
    seq_id: _Number
    path: str | None = None
    overwrite: bool = False
    sampling_session_seq_id: _Count | None = None
    kind: Literal["snapshot"] = "snapshot"
    ttl_seconds: _Number | None = None


class LoadWeights(Body):
    """Load a checkpoint: into the model `model_id`, or as the new model `model_seq_id` of a session."""

    path: str
    optimizer: bool
    model_id: _Text | None = None
    seq_id: _Number | None = None
    session_id: _Text | None = None
    model_seq_id: _Count | None = None
    base_model: _Text | None = None
    user_metadata: _Metadata = None
    optimizer_config: Mapping[str, Literal["adamw"]] | None = None


# Sampling -------------------------------------------------------------------------------------------------------------


class CreateSampler(Body):
    """Open a sampler of a checkpoint, or of the base."""

    session_id: _Text
    sampling_session_seq_id: _Count
    base_model: _Text | None = None
    model_path: str | None = None


class SentChunk(Body):
    """A part of a prompt."""

    type: Literal["encoded_text"] = "encoded_text"
    tokens: list[_Count]


class SentPrompt(Body):
    """A prompt in parts."""

    chunks: list[SentChunk]


class SamplingParams(Body):
    """How to choose tokens. Without `stop` the stop tokens of the base end a sample, else only what is in the list."""

    max_tokens: _Number | None = None
    seed: _Large | None = None
    stop: _Text | Annotated[list[_Text] | list[_Count], Field(max_length=64)] | None = None
    temperature: _Real = 1.0
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] = -1
    top_p: Annotated[_Real, Field(gt=0, le=1)] = 1.0


class SampleBody(Body):
    """Continue a prompt."""

    sampling_session_id: _Text
    seq_id: _Large
    prompt: SentPrompt
    sampling_params: SamplingParams = SamplingParams()
    num_samples: Annotated[_Number, Field(le=128)] = 1
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: _Number | None = None
    topk_prompt_logprobs: _Top = 0
    topk_sample_logprobs: _Top = 0

    def operation(self, facts: ServiceFacts) -> Sample:
        """Return the operation, whose folder the desk fills in. Raise UserError for what this service cannot do."""
        params, last = self.sampling_params, self.prompt_logprobs_last_n
        prompt = tuple(token for chunk in self.prompt.chunks for token in chunk.tokens)
        facts.check_tokens(prompt, "prompt")
        room = facts.max_length - len(prompt)
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if not 0 < max_tokens <= room:
            raise UserError(
                f"sampling_params.max_tokens: {max_tokens:,} and the {len(prompt):,} tokens of the prompt are more than"
                f" {facts.max_length:,} tokens; shorten the prompt or ask for less"
            )
        if last is not None and not (self.prompt_logprobs and last < len(prompt)):
            raise UserError(f"prompt_logprobs_last_n: {last:,} needs prompt_logprobs and a prompt of more tokens")
        stops = [params.stop] if isinstance(params.stop, str) else params.stop
        return Sample(
            folder="",
            prompt=prompt,
            num_samples=self.num_samples,
            max_tokens=max_tokens,
            seed=secrets.randbits(62) if params.seed is None else params.seed,
            temperature=params.temperature,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            stop_tokens=facts.stop_tokens if stops is None else tuple(one for one in stops if isinstance(one, int)),
            stop_texts=tuple(one for one in stops or () if isinstance(one, str)),
            num_top=self.topk_sample_logprobs,
            num_prompt_top=self.topk_prompt_logprobs,
            prompt_logprobs=bool(self.prompt_logprobs),
            prompt_last=last,
        )
