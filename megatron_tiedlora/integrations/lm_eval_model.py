"""Defines the model `tiedlora` of lm_eval (lm-evaluation-harness): a base model of transformers with a native adapter.

It is lm_eval's own model of transformers, `HFLM`, which gets base, adapter and tokenizer from this package. All else is
lm_eval's: log-likelihoods, generation, batches, chat prompts, and data parallelism with `accelerate launch`.
"""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from megatron_tiedlora.base.messages import UserError, as_given, naming, nearest_name
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.data.splits import open_encoding
from megatron_tiedlora.data.tokenizer import start_ids
from megatron_tiedlora.evaluation.plan import as_trained
from megatron_tiedlora.integrations.api import attach, load_adapter, load_base

_DTYPES = {**DTYPES, **{str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}}
_PLACEMENT = ("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder")
# The arguments of HFLM that do not choose another kind of model.
_OPTIONS = {
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "device", *_PLACEMENT),
    *("softmax_dtype", "mixed_precision_dtype", "add_bos_token", "prefix_token_id"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
}


@register_model("tiedlora")
class TiedLoraLM(HFLM):
    """A base model of transformers with a native adapter, and with the tokenizer and chat template of its run."""

    def __init__(
        self,
        adapter: str = "",
        model: str | None = None,
        base_differs: bool = False,
        dtype: str | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        """Load the base model and attach the adapter. --model_args has these arguments.

        Args:
            adapter: the folder of a native adapter: RUN/adapter, a checkpoint, or native/ of an export.
            model: folder or hub id of the base model (default: the base model that the adapter names).
            base_differs: use the adapter although the base differs from the one in training.
            dtype: precision of the base: bf16, fp16 or fp32 (default: the precision in training).
            tokenizer: folder or hub id (default: the tokenizer in training).
            chat_template: file with a chat template (default: the template in training).
            options: arguments of `HFLM`, such as batch_size, max_length, parallelize and enable_thinking.

        Raises:
            UserError: an argument is wrong, or adapter, base or tokenizer cannot be used.
        """
        for name in sorted(options.keys() - _OPTIONS):
            near = nearest_name(name, [*TiedLoraLM.__init__.__annotations__, *_OPTIONS])
            raise UserError(f"--model_args {name}: the model tiedlora has no such argument{near}; remove it")
        if not adapter:
            raise UserError("--model_args: has no adapter; give adapter=RUN/adapter, the folder of a native adapter")
        self._adapter, self._base_differs = load_adapter(adapter), base_differs
        trained = self._adapter.base_identity
        if (name := as_given(dtype or trained.dtype)) not in _DTYPES:
            raise UserError(f"--model_args dtype={name}: is not one of {', '.join(DTYPES)}; give one of these")
        source = find_model(model or trained.base_model)
        self._load: dict[str, Any] = {"model": source.name, "dtype": _DTYPES[name]}
        given: dict[str, Any] = {"tokenizer": tokenizer or trained.tokenizer, "chat_template": chat_template}
        with naming("--model_args"):
            run, _ = as_trained(EvaluateSettings(task="custom", adapter=adapter, **given))
        folder, shape = source.weights_folder(), source.shape
        encoding = open_encoding(run, folder, vocab_size=shape.vocab_size, max_length=shape.limit.tokens)
        options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        options.setdefault("add_bos_token", {"true": True, "false": False}.get(run.add_bos or "auto"))
        if run.add_bos == "true":  # HFLM only lets the tokenizer add its own special tokens
            encoding.tokenizer.add_bos_token = True
            if start_ids(encoding.tokenizer, "auto") != start_ids(encoding.tokenizer, "true"):
                said = "cannot begin texts with its BOS (--add_bos true of the run)"
                raise UserError(f"{encoding.tokenizer.name_or_path}: {said}; give a tokenizer with tokenizer.json")
        super().__init__(str(folder), tokenizer=encoding.tokenizer, **options)

    def apply_chat_template(self, *chat: Any, **options: Any) -> Any:
        """Return the text of a chat. As in training, no BOS is added to such texts, unless the run has --add_bos."""
        self.add_bos_token = getattr(self, "add_bos_token", None) or False
        return super().apply_chat_template(*chat, **options)

    def _create_model(self, pretrained: str, **options: Any) -> None:
        """Load the base and attach the adapter. HFLM calls this with its arguments for the placement of the model."""
        placed = self._get_accelerate_args(device_map=None, **{name: options[name] for name in (*_PLACEMENT, "gpus")})
        base = load_base(self._adapter, **self._load, **placed)
        self._model = attach(base, self._adapter, base_differs=self._base_differs)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Any, additional_config: Any = None) -> "TiedLoraLM":
        """Return the model for --model_args, which have precedence over the flags in `additional_config`."""
        return cls(**{name: value for name, value in (additional_config or {}).items() if value is not None} | arg_dict)
