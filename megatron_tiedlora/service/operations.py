"""The operations that clients of a training service ask for, and their results: plain data that ranks can exchange.

Rank 0 receives requests and puts each model's operations into their order (`desk`). All ranks run them (`worker`). A
model is one adapter with its optimizer. Its name is the client's id of it, and its operations have consecutive numbers.
Weights that a client can use again are native adapters in folders, so that they survive a restart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_tiedlora.parallel.agreement import SentTensor


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
    """The summed loss of a pass, and the log-probability of each target token, (n,) fp32."""

    loss: float
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
        model: the model; "" for `Sample`, which belongs to no model.
        number: the number of the operation among those of the model, from 0 for `Create`.
        fresh: whether gradients that the model still has are dropped first. This is so for the first backward pass
            after a `Step` or `Load`, because a step after a failed pass is rejected before it reaches the engine.
    """

    request: str
    model: str
    number: int
    operation: Operation
    fresh: bool = False
