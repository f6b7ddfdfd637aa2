"""What the HTTP part of a training service knows of the engine behind it: the base, the defaults and the limits."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.methods import find_method


@dataclass(frozen=True)
class ServiceFacts:
    """The base of a training service, its defaults and its limits.

    Attributes:
        model_name: the name by which clients ask for the base, best its name on the hub.
        tokenizer_id: the name or path from which clients load the tokenizer.
        architecture: the name of the base's model family.
        max_length: the maximum number of tokens of a row, and of a prompt with its continuation.
        stop_tokens: the tokens that end a sample whose request does not name others.
        method, alpha, seed: of models whose client does not choose them. Clients cannot choose alpha.
        max_body: the maximum bytes of a request, as it is sent and decompressed.
        max_samples: the maximum number of samples of a request.
        max_top: the maximum number of most likely tokens that a request can ask for.
        poll_seconds: how long the request for a result waits for it. Clients give up after 45 s.
        compressed: whether clients compress passes, for slow networks.
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
    max_rank: int
    max_body: int = 16 * 2**20
    max_samples: int = 128
    max_top: int = 20
    poll_seconds: float = 30.0
    compressed: bool = False

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
