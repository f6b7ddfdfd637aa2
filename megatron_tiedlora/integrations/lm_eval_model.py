"""Defines the model `tiedlora` of lm_eval (lm-evaluation-harness): a base model of transformers with a native adapter.

It is lm_eval's own model of transformers, `HFLM`, which gets base, adapter and tokenizer from this package. All else is
lm_eval's: log-likelihoods, generation, batches, chat prompts, and data parallelism with `accelerate launch`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from megatron_tiedlora.base.messages import UserError, as_given, nearest_name
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.convert.inputs import adapter_kind
from megatron_tiedlora.data.splits import open_encoding
from megatron_tiedlora.data.tokenizer import start_ids
from megatron_tiedlora.evaluation.plan import as_trained
from megatron_tiedlora.integrations.api import attach, load_adapter, load_base

NAME = "tiedlora"
_OWN = ("adapter", "model", "base_differs", "dtype", "tokenizer")
# Arguments of HFLM for other kinds of models, and for what the adapter's files decide.
_OTHERS = (
    *("self", "kwargs", "pretrained", "backend", "revision", "subfolder", "gguf_file", "peft", "delta", "autogptq"),
    *("gptqmodel", "tp_plan", "trust_remote_code", "use_fast_tokenizer"),
)
_OPTIONS = inspect.signature(HFLM.__init__).parameters.keys() - {*_OTHERS, *_OWN}
_DTYPES = {**DTYPES, **{str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}}


@register_model(NAME)
class TiedLoraLM(HFLM):  # type: ignore[misc]
    """A base model of transformers with a native adapter, and with the tokenizer and chat template of its run."""

    def __init__(
        self,
        adapter: str | None = None,
        model: str | None = None,
        base_differs: bool = False,
        dtype: str | None = None,
        tokenizer: str | None = None,
        **options: Any,
    ) -> None:
        """Load the base model and attach the adapter. --model_args has these arguments.

        Args:
            adapter: the folder of a native adapter: RUN/adapter, a checkpoint, or native/ of an export.
            model: folder or hub id of the base model (default: the base model that the adapter names).
            base_differs: use the adapter although the base differs from the one in training.
            dtype: precision of the base: bf16, fp16 or fp32 (default: the precision in training).
            tokenizer: folder or hub id (default: the tokenizer in training).
            options: arguments of `HFLM`, such as batch_size, max_length, parallelize and enable_thinking.

        Raises:
            UserError: an argument is unknown or wrong, or adapter, base or tokenizer cannot be used.
        """
        for name in sorted(options.keys() - _OPTIONS):
            near = nearest_name(name, [*_OWN, *_OPTIONS])
            raise UserError(f"--model_args {name}: the model {NAME} has no such argument{near}; remove it")
        if adapter is None:
            raise UserError("--model_args: has no adapter; give adapter=RUN/adapter, the folder of a native adapter")
        if adapter_kind(adapter, flag=f"--model_args adapter={adapter}") == "peft":
            fix = f"give it to lm_eval's own model: --model hf --model_args pretrained=BASE,peft={adapter}"
            raise UserError(f"--model_args adapter={adapter}: this is a PEFT adapter; {fix}")
        self._adapter = load_adapter(adapter)
        trained = self._adapter.base_identity
        if (name := trained.dtype if dtype is None else as_given(dtype)) not in _DTYPES:
            raise UserError(f"--model_args dtype={name}: is not one of {', '.join(DTYPES)}; give one of these")
        self._load = {"model": model or trained.base_model, "dtype": _DTYPES[name]}
        self._base_differs, source = base_differs, find_model(model or trained.base_model)
        tokenizer = tokenizer or trained.tokenizer
        reading, _ = as_trained(EvaluateSettings(task="custom", adapter=adapter, tokenizer=tokenizer))
        vocab_size, limit = source.shape.vocab_size, source.shape.limit.tokens
        encoding = open_encoding(reading, source.weights_folder(), vocab_size=vocab_size, max_length=limit)
        adds, starts = reading.add_bos or "auto", start_ids(encoding.tokenizer, "auto")
        if options.get("add_bos_token") is None and adds != "auto":
            if adds == "true" and starts != start_ids(encoding.tokenizer, adds):
                said = "--model_args: the adapter's run had --add_bos true, but its tokenizer adds no such token"
                raise UserError(f"{said} itself; give add_bos_token=False, or a tokenizer that adds it")
            options["add_bos_token"] = adds == "true"
        options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(str(source.weights_folder()), tokenizer=encoding.tokenizer, **options)

    def _create_model(
        self, pretrained: str, *, parallelize: bool | None = False, gpus: int | None = None, **options: Any
    ) -> None:
        """Load the base and attach the adapter. HFLM calls this with its arguments for the placement of the model."""
        del pretrained
        names = ("max_memory_per_gpu", "max_cpu_memory", "offload_folder")
        placed = self._get_accelerate_args(
            parallelize=parallelize, device_map=None, gpus=gpus, **{name: options.get(name) for name in names}
        )
        base = load_base(self._adapter, **self._load, **placed)
        self._model = attach(base, self._adapter, base_differs=self._base_differs)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "TiedLoraLM":
        """Return the model for --model_args, which have precedence over the flags in `additional_config`."""
        return cls(**{**{k: v for k, v in (additional_config or {}).items() if v is not None}, **arg_dict})
