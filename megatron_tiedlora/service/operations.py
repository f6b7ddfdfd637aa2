"""The operations that clients of a training service ask for, and their results: plain data that ranks can exchange.

Rank 0 receives requests and puts each model's operations into their order (`desk`). All ranks run them (`worker`). A
model is one adapter with its optimizer. Its name is the client's id of it, and its operations have consecutive numbers.
Weights that a client can use again are native adapters in folders, so that they survive a restart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.methods import find_method
from megatron_tiedlora.parallel.agreement import SentTensor

LARGEST = 1e30  # of a client's numbers, so that torch can convert them, and products with them, to fp32


@dataclass(frozen=True)
class Create:
    """Create a model.

    Attributes:
        targets: names of linears, as in --targets.
        folder: a checkpoint that decides all of these and has the weights to start with, or "" for initial weights.
        optimizer: whether the moments of the checkpoint are restored too.
    """

    method: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int
    folder: str = ""
    optimizer: bool = False


@dataclass(frozen=True)
class Pass:
    """Compute the losses of rows of tokens, and with `backward` add their gradients to those of the model.

    Attributes:
        lengths: the number of tokens of each row; their sum is n.
        tokens: (n,) int64, the rows one after the other.
        targets: (n,) int64, the token that each token predicts.
        inputs: (2, n) fp32, the numbers of each token in the order of the objective's `inputs`; zeros if it has one.
        objective: the name of the loss, a key of `objectives.KINDS`.
        settings: settings of the loss that differ from its defaults.
    """

    lengths: tuple[int, ...]
    tokens: SentTensor
    targets: SentTensor
    inputs: SentTensor
    objective: str
    settings: Mapping[str, float]
    backward: bool


@dataclass(frozen=True)
class Step:
    """Clip the gradients of a model, take a step of AdamW and drop the gradients. `max_norm` 0 does not clip."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_norm: float


@dataclass(frozen=True)
class Save:
    """Write the weights of a model to a new folder: a checkpoint with the optimizer, or an adapter without it."""

    folder: str
    optimizer: bool
    kind: Literal["save"] = "save"


@dataclass(frozen=True)
class Load:
    """Replace the weights of a model by those of a checkpoint, and its optimizer by a new or the saved one."""

    folder: str
    optimizer: bool
    kind: Literal["load"] = "load"


@dataclass(frozen=True)
class Sample:
    """Continue a prompt. Samples depend only on the weights and on these attributes.

    Attributes:
        folder: the adapter, or "" for the base.
        temperature: 0 chooses the most likely token.
        top_k: the number of most likely tokens to choose from; 0 for all.
        stop_tokens: a sequence ends after any of these, which is its last token.
        stop_texts: a sequence ends after a token with which its text contains any of these.
        num_top: the number of most likely tokens to report with each new token.
        num_prompt_top: the number of most likely tokens to report at each token of the prompt.
        prompt_logprobs: whether the log-probabilities of the prompt's tokens are wanted.
        prompt_last: only the last tokens of the prompt have log-probabilities; None for all.
    """

    folder: str
    prompt: tuple[int, ...]
    num_samples: int
    max_tokens: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    stop_tokens: tuple[int, ...]
    stop_texts: tuple[str, ...]
    num_top: int
    num_prompt_top: int
    prompt_logprobs: bool
    prompt_last: int | None


Operation = Create | Pass | Step | Save | Load | Sample


# Results --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """The result of an operation without values."""


@dataclass(frozen=True)
class PassResult:
    """The summed loss of a pass, the tokens of each row, and the log-probability of each target, (n,) fp32."""

    loss: float
    lengths: tuple[int, ...]
    logprobs: SentTensor


@dataclass(frozen=True)
class StepResult:
    """The number of the step (from 1) and the gradient norm before clipping."""

    step: int
    grad_norm: float


Top = tuple[tuple[int, float], ...]  # the most likely tokens and their log-probabilities, in descending order


@dataclass(frozen=True)
class Sampled:
    """One sequence: new tokens with the stop token, their log-probabilities under softmax(logits) before top-k
    and top-p (temperature 1), and whether the sequence was stopped (otherwise it has `max_tokens` tokens)."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    top: tuple[Top, ...]


@dataclass(frozen=True)
class SampleResult:
    """The sequences of a prompt. `prompt_logprobs` has one number per token of the prompt, nan where there is none."""

    sequences: tuple[Sampled, ...]
    prompt_logprobs: tuple[float, ...] | None
    prompt_top: tuple[Top, ...] | None


@dataclass(frozen=True)
class Failure:
    """Why an operation failed. `by_user` says whether the client can mend it."""

    message: str
    by_user: bool


OperationResult = Done | PassResult | StepResult | SampleResult | Failure


@dataclass(frozen=True)
class Ticket:
    """An operation whose turn has come.

    Attributes:
        request: the id under which the client asks for the result.
        owner: whose operation it is; operations of different owners take turns.
        model: the model; "" for `Sample`, which belongs to no model.
        number: the number of the operation among those of the model, from 0 for `Create`.
        fresh: whether gradients that the model still has are dropped first. This is so for the first backward pass
            after a `Step`, because a step after a failed pass is rejected before it reaches the engine.
    """

    request: str
    owner: str
    model: str
    number: int
    operation: Operation
    fresh: bool = False


# The service ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServiceFacts:
    """What the HTTP part knows of the engine behind it: the base of the service, its defaults and its limits.

    Attributes:
        model_name: the name by which clients ask for the base, best its name on the hub.
        tokenizer_id: the name or path from which clients load the tokenizer.
        architecture: the name of the base's model family.
        max_length: the maximum number of tokens of a row, and of a prompt with its continuation.
        stop_tokens: the tokens that end a sample whose request does not name others.
        method, alpha, seed: of models whose client does not choose them. Clients cannot choose alpha.
        max_body: the maximum bytes of a request, as it is sent and decompressed.
        poll_seconds: how long the request for a result waits for it. Clients give up after 45 s.
    """

    model_name: str
    tokenizer_id: str
    architecture: str
    vocab_size: int
    max_length: int
    stop_tokens: tuple[int, ...]
    method: str
    alpha: float
    seed: int
    max_body: int = 16 * 2**20
    poll_seconds: float = 30.0

    @property
    def max_json(self) -> int:
        """Return the maximum bytes of a JSON body, in which the longest prompt has room."""
        return min(self.max_body, 2**18 + 16 * self.max_length)

    def method_of(self, base_model: str, metadata: Mapping[str, object] | None = None) -> str:
        """Return the method that a client asks for: in NAME:METHOD, else in the model's metadata, else the default.

        Raises:
            UserError: this service does not have the base model, or the method is unknown.
        """
        name, _, method = base_model.rpartition(":")
        if base_model == self.model_name:
            asked = (metadata or {}).get("method", self.method)
            return find_method(asked if isinstance(asked, str) else shown(asked)).name
        if name != self.model_name:
            use = f"Use {self.model_name}, or {self.named(self.method)} to choose a method"
            raise UserError(f"base_model {shown(base_model)}: this server has {self.model_name}. {use}")
        return find_method(method).name

    def named(self, method: str) -> str:
        """Return the name of the base with a method, by which clients create models of this method."""
        return f"{self.model_name}:{method}"

    def check_tokens(self, tokens: Sequence[int] | np.ndarray, what: str) -> None:
        """Raise UserError if a row is empty, too long, or has a token that is not in the vocabulary."""
        if not 0 < len(tokens) <= self.max_length:
            raise UserError(f"{what}: has {len(tokens):,} tokens; send 1 to {self.max_length:,}")
        for found in (np.min(tokens), np.max(tokens)):
            if not 0 <= found < self.vocab_size:
                raise UserError(f"{what}: {found} is not a token of {self.model_name}, which has {self.vocab_size:,}")
