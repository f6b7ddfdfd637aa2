"""Answered requests for a training service: bodies in, calls of the desk, and the fields of the answer out.

This knows neither HTTP nor the results of operations, which `http` sends when they exist.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.base.shapes import ATTENTION_TARGETS, MLP_TARGETS
from megatron_tiedlora.service import bodies
from megatron_tiedlora.service.bodies import read_body, read_name
from megatron_tiedlora.service.operations import Create, Load, Operation, Pass, Save, ServiceFacts, Step
from megatron_tiedlora.service.records import Refused
from megatron_tiedlora.service.wire import pass_of, read_pass

if TYPE_CHECKING:
    from megatron_tiedlora.service.desk import Desk

Reply = dict[str, Any]

TESTED_CLIENTS = (25, 38)  # the first and the last minor release of the `tinker` SDK that were tried
_CHECKPOINT_TYPES = {"weights": "training", "sampler_weights": "sampler"}


class Endpoints:
    """The endpoints of a training service. Each returns the fields of its answer.

    Raises (all of them):
        UserError: the request is rejected. `status_of` is the HTTP status.
    """

    def __init__(self, desk: "Desk", facts: ServiceFacts) -> None:
        self._desk, self._facts = desk, facts

    # Clients and sessions

    def client_config(self, owner: str, raw: bytes) -> Reply:
        """Return the settings of the client. Those of functions that this server lacks are false by default."""
        return {"fwdbwd_max_chunk_bytes_count": min(5_000_000, self._facts.max_body // 2)}  # of arrays alone

    def capabilities(self, owner: str) -> Reply:
        """Return the models of this server: the base with the default method, and with each method."""
        names = [self._facts.model_name, *map(self._facts.named, METHOD_NAMES)]
        can = {"max_context_length": self._facts.max_length, "trainable": True, "sampleable": True}
        return {"supported_models": [{"model_name": name, **can} for name in names]}

    def create_session(self, owner: str, raw: bytes) -> Reply:
        """Open a session."""
        sent = read_body(raw, bodies.CreateSession)
        session = self._desk.open_session(owner, metadata=bodies.described(sent.user_metadata))
        warning = "This server does not train the unembedding: train_unembed has no effect."
        (first, last), release = TESTED_CLIENTS, re.match(r"0\.(\d{1,4})(\.|$)", sent.sdk_version)
        if release is None or not first <= int(release[1]) <= last:
            warning += f" It was tested with tinker 0.{first} to 0.{last}, and this is {sent.sdk_version or 'unknown'}."
        return {"session_id": session, "warning_message": warning}

    def heartbeat(self, owner: str, raw: bytes) -> Reply:
        """Note that the client of a session lives."""
        self._desk.heartbeat(owner, read_name(raw, "session_id"))
        return {}

    def finish_session(self, owner: str, session_id: str) -> Reply:
        """End a session."""
        self._desk.finish_session(owner, session_id)
        return {}

    # Models

    def create_model(self, owner: str, raw: bytes) -> Reply:
        """Create a model."""
        sent = read_body(raw, bodies.CreateModel)
        create, info = sent.operation(self._facts), bodies.described(sent.user_metadata)
        return {"request_id": self._desk.create(owner, sent.session_id, sent.model_seq_id, create, info=info)}

    def get_info(self, owner: str, raw: bytes) -> Reply:
        """Describe a model."""
        model, facts = read_name(raw, "model_id"), self._facts
        rank = self._desk.model_of(owner, model).create.rank
        data = {"arch": facts.architecture, "model_name": facts.model_name, "tokenizer_id": facts.tokenizer_id}
        return {"model_id": model, "model_data": data, "is_lora": True, "lora_rank": rank}

    def forward_backward(self, owner: str, raw: bytes) -> Reply:
        """Submit a pass. The body is protobuf."""
        sent = read_pass(raw)
        where = owner, sent.model_id, sent.seq_id
        return self._numbered(where, Pass, lambda: self._desk.submit(*where, pass_of(sent, self._facts), size=len(raw)))

    def optim_step(self, owner: str, raw: bytes) -> Reply:
        """Submit a step of the optimizer."""
        where = _operation(owner, raw)
        return self._numbered(
            where, Step, lambda: self._desk.submit(*where, read_body(raw, bodies.OptimStep).operation(), size=len(raw))
        )

    def save(self, owner: str, raw: bytes, kind: Literal["weights", "sampler_weights"]) -> Reply:
        """Save a model with its optimizer, or its weights for a sampler."""
        where = _operation(owner, raw)

        def save() -> str:
            sent = read_body(raw, bodies.SaveWeights)
            options: dict[str, Any] = {"session_number": sent.sampling_session_seq_id, "ttl_seconds": sent.ttl_seconds}
            return self._desk.save(*where, sent.path, kind=kind, overwrite=sent.overwrite, **options)

        return self._numbered(where, Save, save)

    def load_weights(self, owner: str, raw: bytes) -> Reply:
        """Load a checkpoint into a model, or create a model of it, which has the shape of the checkpoint's model."""
        sent = read_body(raw, bodies.LoadWeights)
        if sent.session_id is None or sent.model_seq_id is None:
            where = _operation(owner, raw)
            return self._numbered(where, Load, lambda: self._desk.load(*where, sent.path, optimizer=sent.optimizer))
        old = self._desk.checkpoint_of(owner, sent.path).create
        if sent.base_model is not None:
            self._facts.method_of(sent.base_model)
        new = Create(old.method, old.rank, old.alpha, old.targets, old.seed, folder=sent.path, optimizer=sent.optimizer)
        info = bodies.described(sent.user_metadata)
        return {"request_id": self._desk.create(owner, sent.session_id, sent.model_seq_id, new, info=info)}

    def _numbered(self, where: tuple[str, str, int], kind: type[Operation], submit: Callable[[], str]) -> Reply:
        """Return the future of an operation. The number of an operation that is rejected for good is used up all the
        same, as the client's next operation would wait for it for ever. Its future fails with the reason."""
        try:
            return {"request_id": submit()}
        except UserError as error:
            if status_of(error) in (410, 429, 503):  # the session has ended, or the client sends the operation again
                raise
            return {"request_id": self._desk.reject(*where, kind, str(error))}

    # Samplers

    def create_sampler(self, owner: str, raw: bytes) -> Reply:
        """Open a sampler of a checkpoint or of the base."""
        sent = read_body(raw, bodies.CreateSampler)
        if sent.model_path is None and sent.base_model is None:
            raise UserError("model_path and base_model are missing; send one of them")
        if sent.base_model is not None:
            self._facts.method_of(sent.base_model)
        number = sent.sampling_session_seq_id
        return {"sampling_session_id": self._desk.open_sampler(owner, sent.session_id, number, path=sent.model_path)}

    def sampler(self, owner: str, sampler_id: str) -> Reply:
        """Describe a sampler."""
        path = self._desk.sampler_of(owner, sampler_id).path
        return {"sampler_id": sampler_id, "base_model": self._facts.model_name, "model_path": path or None}

    def sample(self, owner: str, raw: bytes) -> Reply:
        """Submit a prompt."""
        sent = read_body(raw, bodies.SampleBody)
        sample = sent.operation(self._facts)
        future, sequences = self._desk.sample(owner, sent.sampling_session_id, sent.seq_id, sample)
        return {"request_id": future, "sample_sequence_ids": sequences}

    # Saved weights

    def weights_info(self, owner: str, raw: bytes) -> Reply:
        """Describe the model of a checkpoint, so that a client can create one like it."""
        create = self._desk.checkpoint_of(owner, read_name(raw, "tinker_path")).create
        return {
            "base_model": self._facts.named(create.method),
            "is_lora": True,
            "lora_rank": create.rank,
            "train_unembed": False,
            "train_mlp": not set(MLP_TARGETS).isdisjoint(create.targets),
            "train_attn": not set(ATTENTION_TARGETS).isdisjoint(create.targets),
        }

    def training_run(self, owner: str, model_id: str) -> Reply:
        """Describe a model, with its client's metadata."""
        found = self._desk.model_of(owner, model_id)
        return {
            "training_run_id": model_id,
            "base_model": self._facts.named(found.create.method),
            "model_owner": owner,
            "is_lora": True,
            "lora_rank": found.create.rank,
            "last_request_time": _date(found.created),
            "user_metadata": dict(found.info),
        }

    def checkpoints(self, owner: str, model_id: str | None = None) -> Reply:
        """List the checkpoints of a model, or of all models of the owner."""
        listed = []
        for found in self._desk.checkpoints(owner, model_id):
            kind, name = found.key.split("/")[-2:]
            fields = {"checkpoint_id": f"{kind}/{name}", "checkpoint_type": _CHECKPOINT_TYPES[kind]}
            fields |= {"tinker_path": found.key, "time": _date(found.created)}
            listed.append({**fields, "size_bytes": found.size})
        return {"checkpoints": listed}

    def delete_checkpoint(self, owner: str, model_id: str, checkpoint_id: str) -> Reply:
        """Delete a checkpoint, whose id is weights/NAME or sampler_weights/NAME."""
        self._desk.delete_checkpoint(owner, f"tinker://{model_id}/{checkpoint_id}")
        return {}


def status_of(error: UserError) -> int:
    """Return the HTTP status of a rejected request."""
    return error.status if isinstance(error, Refused) else 400


def _operation(owner: str, raw: bytes) -> tuple[str, str, int]:
    sent = read_body(raw, bodies.OperationId)
    return owner, sent.model_id, sent.seq_id


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
