"""Declares the settings of the command serve-training."""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.config.fields import CommandSettings, marked, setting_field, shared_field
from megatron_tiedlora.config.settings import DEFAULT_MODEL, DEFAULT_TASK, Settings, make_settings

_train = partial(shared_field, Settings)
_model = partial(setting_field, "model")
_service = partial(setting_field, "run")
_limit = partial(setting_field, "limits", ge=1)


class ServiceSettings(CommandSettings, command="serve-training"):
    """The settings of one training service, validated and frozen."""

    about: ClassVar[str] = """\
Serve training to many clients: each trains adapters of its own on one base, by the protocol of the `tinker` SDK.

    tiedlora serve-training --token_file tokens --new_token ana                    a token for a client, printed once
    tiedlora serve-training --model FOLDER --model_name Qwen/Qwen3-8B --state DIR --token_file tokens
    torchrun --nproc_per_node 8 -m megatron_tiedlora serve-training --model FOLDER --tensor_parallel 4 ...

Clients set TINKER_BASE_URL=http://127.0.0.1:8473 and TINKER_API_KEY to their token (docs/service.md). A client names
the method with the model, as in base_model="Qwen/Qwen3-8B:tl6". Everything that was accepted is in --state before it is
answered: after a crash, the same command goes on, and clients notice a pause. Ctrl-C and SIGTERM stop the service."""
    examples: ClassVar[str] = ""
    groups: ClassVar[Mapping[str, str]] = {
        "run": "who may use it, and where",
        "model": "the frozen base",
        "parallel": "model sharding (data-parallel size = world size / (tensor x pipeline))",
        "speed": "settings that trade memory for time",
        "limits": "what clients may use",
    }

    state: str | None = _service("folder of everything that must survive a restart", None, metavar="DIR", holds="path")
    token_file: str = _service("file with the tokens of clients; mode 0600", metavar="FILE", holds="path")
    new_token: str | None = _service("add a client with this name to --token_file, print its token, and end", None,
                                     metavar="NAME")
    host: str = _service("address to listen on; there is no TLS, so put a proxy before any other", "127.0.0.1")
    port: int = _service("port to listen on", 8473, ge=0, le=65535)

    model: str = _train("model")
    model_name: str | None = _model("name by which clients ask for the model, such as a hub id [--model]", None)
    tokenizer: str | None = _train("tokenizer")
    dtype: Literal["bf16", "fp32"] | None = _train("dtype")
    base: str | None = _train("base")
    products: Literal["fp8"] | None = _train("products")
    max_length: int | None = _train(
        "max_length", "maximum tokens of a row [4096, or the model's limit if that is lower]", default=None
    )
    method: str = _train("method", "method of models whose client names none", group="model")
    alpha: float = _model("alpha of all models; an update is scaled by alpha / rank", 32.0, gt=0)

    ds_config: str = _train("ds_config", default="zero0.json", group="parallel")
    tensor_parallel: int = _train("tensor_parallel")
    pipeline_parallel: int = _train("pipeline_parallel", "stages, each with some of the layers")
    sequence_parallel: bool = _train("sequence_parallel")
    timeout_minutes: float = _train("timeout_minutes", "longest wait for another rank before the service fails",
                                    group="parallel")
    compile: Literal["auto", "true", "false"] = _train("compile", default="false")
    recompute: Literal["none", "selective", "full"] = _train("recompute")
    micro_batch_size: int | None = _train("micro_batch_size", "rows of --max_length that fit into a micro-batch [1]",
                                          group="speed")
    share_micro_batches: bool = _train(
        "share_micro_batches", "fill a micro-batch with rows of several models; false: each model has the bits of a"
        " service alone at every layout", group="speed", shared=False,
    )
    state_steps: int = setting_field("speed", "steps of a model between saved states", 8, ge=1)

    max_models: int | None = _limit("models in memory at once [what fits]", None)
    max_rank: int | None = _limit("rank of a model [64, or the model's width if that is lower]", None)
    owner_models: int = _limit("models of a client", 64)
    owner_disk_gb: float = setting_field("limits", "gigabytes of a client's checkpoints", 20.0, gt=0)
    request_tokens: int = _limit("tokens of a request", 2**20)

    def _check_fit(self) -> None:
        if self.new_token is None and self.state is None:
            raise ValueError("--state is required: a folder of everything that must survive a restart")

    def train(self, world_size: int, *, width: int) -> Settings:
        """Return the settings of a run on `world_size` ranks with a usual adapter, which decides how the layers of the
        base are divided into stages. `width` is the hidden size of the model."""
        given = self.model_dump(include=set(marked(ServiceSettings, shared=True)) & self.model_fields_set)
        given |= {"ds_config": self.ds_config, "compile": self.compile}
        rows = {"task": DEFAULT_TASK} if self.model == DEFAULT_MODEL else {"task": "custom", "train_file": "of clients"}
        rank, samples = min(8, self.largest_rank(width)), 64 * world_size * (self.micro_batch_size or 1)
        return make_settings({
            **given, **rows, "rank": rank, "targets": TARGET_NAMES, "alpha": self.alpha,
            "schedule": "constant", "warmup_steps": 0, "global_batch_size": samples,
        })

    def largest_rank(self, width: int) -> int:
        """Return the largest rank that a client may ask for. `width` is the hidden size of the model."""
        return self.max_rank or min(64, width)
