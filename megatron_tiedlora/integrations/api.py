"""Provides the Python interface: functions that load, attach, detach and merge adapters of transformers models,
generate text, and train in this process."""

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from megatron_tiedlora.adapters.tied_adapter import AdapterShard, TiedAdapter
from megatron_tiedlora.base.installation import require_extra
from megatron_tiedlora.base.messages import UserError, user_path
from megatron_tiedlora.checkpoint import load_model, sources, tensor_files
from megatron_tiedlora.checkpoint.base_identity import base_layer_of, check_same_base, identify_in_memory, model_source
from megatron_tiedlora.checkpoint.native_adapter import AdaptedTensor, NativeAdapter, load_native_adapter
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.convert.inputs import adapter_kind
from megatron_tiedlora.parallel.shard_spec import stream_seed
from megatron_tiedlora.runtime import launch_env, process_group, stopping
from megatron_tiedlora.training.run import train_rank


@dataclass
class _Attachment:
    """An adapter that is attached to or merged into a model. `hooks` has the forward hooks of an attached adapter."""

    adapter: NativeAdapter
    merged: bool = False
    hooks: list[RemovableHandle] = field(default_factory=list)


_STATE = "_tiedlora_state"  # the attribute of a model that holds its `_Attachment`


def load_adapter(path: str | Path) -> NativeAdapter:
    """Load and return an adapter from a run's adapter/ folder, a checkpoint, or the native/ folder of an export.

    Raises:
        UserError: the folder has no adapter in this package's format, or its files are damaged.
    """
    if adapter_kind(path, flag=str(path)) == "peft":
        raise UserError(f"{path}: this is a PEFT adapter; load it with PEFT, or import it with tiedlora import")
    return load_native_adapter(user_path(path))


def load_base(
    adapter: NativeAdapter, model: str | None = None, *, dtype: torch.dtype | None = None, **keywords: Any
) -> Any:
    """Load the base model of an adapter, and return it as a transformers model in evaluation mode.

    Args:
        model: folder or hub id of the base model (default: the base model that the adapter record names).
        dtype: dtype of the weights (default: the dtype that was used in training).
        keywords: further arguments of transformers' `from_pretrained`, such as `device_map`.

    Raises:
        UserError: the base model cannot be found, or its model family is not supported.
    """
    import transformers

    trained = adapter.base_identity
    folder = (source := sources.find_model(model or trained.base_model)).weights_folder()
    # The config's own may name code on the hub.
    keywords.setdefault("attn_implementation", source.attention_in_transformers)
    load, own = getattr(transformers, source.auto_class).from_pretrained, dtype or tensor_files.DTYPES[trained.dtype]
    return load(folder, dtype=own, use_safetensors=True, trust_remote_code=False, **keywords).eval()


def attach(model: Any, adapter: NativeAdapter, *, base_differs: bool = False) -> Any:
    """Attach an adapter to a causal language model of transformers, and return the model.

    Tied tensors are not copied: all layers use the same A and B. The model's modules and weights do not change, and
    `detach` removes the adapter. The outputs are the same as with the PEFT export of the adapter.

    Args:
        base_differs: accept a model that is not the adapter's base model but has the same shape.

    Raises:
        UserError: the model already has an adapter, or is not the adapter's base model.
    """
    _check(model, adapter, base_differs=base_differs)
    _attach(model, adapter)
    return model


def detach(model: Any) -> Any:
    """Remove the attached adapter from a model, and return the model. Raises UserError if none is attached."""
    for hook in _attached(model).hooks:
        hook.remove()
    delattr(model, _STATE)
    return model


def merge(model: Any, adapter: NativeAdapter | None = None, *, base_differs: bool = False) -> Any:
    """Merge an adapter into the weights of a causal language model in place, and return the model.

    The merged weights are bit-identical to those that `tiedlora merge` writes for this model in this dtype.

    Args:
        adapter: the adapter to merge (default: the attached adapter, which is then detached).
        base_differs: see `attach`.

    Raises:
        UserError: see `attach`; also if the weights are quantised, offloaded or sharded.
    """
    if adapter is None:
        attached = _attached(model).adapter  # it was checked when it was attached
        detach(model)
        try:
            _merge(model, attached)
        except UserError:
            _attach(model, attached)
            raise
        return model
    _check(model, adapter, base_differs=base_differs)
    _merge(model, adapter)
    return model


@overload
def generate(model: Any, prompts: str, **keywords: Any) -> str: ...
@overload
def generate(model: Any, prompts: Sequence[str], **keywords: Any) -> list[str]: ...
def generate(
    model: Any,
    prompts: str | Sequence[str],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = Settings.model_fields["seed"].default,
    tokenizer: Any = None,
    **keywords: Any,
) -> str | list[str]:
    """Generate answers to prompts with transformers' `generate`, and return the answers without the prompts.

    The same seed gives the same answers on the same device, but other samples than in `tiedlora evaluate`. PyTorch's
    random state is restored. Answers do not depend on other prompts, but equal prompts in one call get other samples.

    Args:
        prompts: one prompt, or a sequence of prompts.
        temperature: samples are from softmax(logits / temperature). The default is greedy decoding.
        top_p: samples are only from the most likely tokens with a total probability of at least `top_p`.
        tokenizer: a transformers tokenizer (default: the tokenizer that was used to train the attached adapter, or else
            the tokenizer in the model's folder).
        keywords: further arguments of transformers' `generate` (default: max_new_tokens=256). do_sample=True without a
            temperature samples as the model's generation config says, with `top_p` if that is below 1.

    Raises:
        UserError: `temperature`, `top_p` or `seed` is out of range, or `top_p` is given for greedy decoding.
    """
    sampled = temperature or float(bool(keywords.get("do_sample")))
    checked = EvaluateSettings(temperature=sampled, top_p=top_p, seed=seed)
    if tokenizer is None:
        from megatron_tiedlora.data.tokenizer import load_tokenizer

        state = getattr(model, _STATE, None)
        own = None if state is None else state.adapter.base_identity.tokenizer
        tokenizer = load_tokenizer(own or model.config.name_or_path)
    options: dict[str, Any] = {"max_new_tokens": 256, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    options |= {"top_p": checked.top_p} if top_p < 1 else {}
    if temperature:  # transformers' default of top_k is 50
        options |= {"do_sample": True, "temperature": checked.temperature, "top_p": checked.top_p, "top_k": 0}
    options |= keywords
    answers = []  # one by one, as padding may change the last bits
    for index, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        with torch.no_grad(), _seeded(stream_seed(checked.seed, f"sampling.{index}")):
            found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        answers.append(tokenizer.decode(found[0, tokens.shape[1] :], skip_special_tokens=True))
    return answers[0] if isinstance(prompts, str) else answers


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's generators of the CPU and of all GPUs in a block, and restore their states when it ends."""
    generators = torch.cuda.default_generators  # empty before the first use of a GPU
    with torch.random.fork_rng(range(len(generators))):
        for generator in (torch.default_generator, *generators):
            generator.manual_seed(seed)
        yield


def _check(model: Any, adapter: NativeAdapter, *, base_differs: bool) -> None:
    """Raise UserError if the adapter does not fit the model. Emit notes on the base model as Python warnings."""
    state = getattr(model, _STATE, None)
    if state is not None:
        is_merged = "an adapter is already merged into the model; load the model again"
        raise UserError(is_merged if state.merged else "the model already has an adapter; call detach(model) first")
    trained, found = adapter.base_identity, identify_in_memory(model, model_source(model))
    for note in check_same_base(trained, found, source="the adapter", differs=base_differs, in_memory=True):
        warnings.warn(note, stacklevel=3)  # points to the caller of attach or merge


def _attach(model: Any, adapter: NativeAdapter) -> None:
    update, places = _on(model, adapter)
    modules = {name: model.get_submodule(name) for name in places}
    added = {name: partial(_add_update, update, place) for name, place in places.items()}
    hooks = [modules[name].register_forward_hook(hook) for name, hook in added.items()]
    setattr(model, _STATE, _Attachment(adapter, hooks=hooks))


def _add_update(
    update: TiedAdapter, place: AdaptedTensor, module: nn.Module, inputs: tuple[torch.Tensor, ...], z: torch.Tensor
) -> torch.Tensor:
    """Return the module output z plus the adapter's update. This forward hook can be copied and pickled."""
    return load_model.with_update(z, inputs[0], update, place)


def _merge(model: Any, adapter: NativeAdapter) -> None:
    update, places = _on(model, adapter)
    for name, place in places.items():  # check all weights before one is changed
        load_model.check_whole(model.get_submodule(name).weight.data, place)
    for name, place in places.items():
        load_model.merge_(model.get_submodule(name).weight.data, update, place)
    setattr(model, _STATE, _Attachment(adapter, merged=True))


def _on(model: Any, adapter: NativeAdapter) -> tuple[TiedAdapter, dict[str, AdaptedTensor]]:
    """Return the adapter on the model's device, and, by module name, the weights that it changes."""
    update = TiedAdapter(AdapterShard.whole(adapter.config)).requires_grad_(False).load_full(adapter.state)
    places = dict(load_model.find_places(model_source(model).shape, adapter.config))
    device = base_layer_of(model.get_submodule(next(iter(places)))).weight.device
    return (update if device.type == "meta" else update.to(device)), places  # meta: an offloaded module


def _attached(model: Any) -> _Attachment:
    state = getattr(model, _STATE, None)
    if state is None or state.merged:
        raise UserError("the model has no attached adapter; call attach(model, adapter) first")
    assert isinstance(state, _Attachment)
    return state


@dataclass(frozen=True)
class TrainedRun:
    """The result of a finished training run.

    Attributes:
        folder: the run folder.
        adapter: the folder of the run's best adapter, which `load_adapter` can read.
        step: the number of the last training step.
        reason: why the run ended: max_steps or early_stopping.
    """

    folder: Path
    adapter: Path
    step: int
    reason: str


def train(settings: Settings) -> TrainedRun:
    """Train in this process like `tiedlora train`, with the same output and files, and return the finished run.

    Without a launcher the run has one rank. Under a launcher such as torchrun, every rank calls this function. Before
    returning, it restores the signal handlers and the environment variables of a rank.

    Raises:
        UserError: a setting is invalid, or the run cannot start with these settings.
        KeyboardInterrupt: the run was stopped by Ctrl-C; it can be resumed.
        RuntimeError: the run was stopped by another signal.
        Exception: any other error that ended the run.
    """
    require_extra("train")
    if settings.dry_run:
        raise UserError("dry_run: train() does not support dry runs; use the command: tiedlora train --dry_run")
    if settings.adapters is not None:
        raise UserError("adapters: train() trains only one adapter; use the command: tiedlora train --adapters FILE")
    with _restored_process():
        launch_env.prepare_environment()
        try:
            end = train_rank(settings)
        except SystemExit as failed:
            raise (failed.__context__ or failed) from None  # it was reported, and only the command needs the status
    if end.status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if end.status or end.folder is None:
        raise RuntimeError(f"the run was stopped before it finished (exit status {end.status})")
    return TrainedRun(end.folder.path, end.folder.adapter, end.step, end.reason)


@contextmanager
def _restored_process() -> Iterator[None]:
    """Leave the process group, and restore environment variables and signal handlers, when the block ends."""
    with ExitStack() as restored:
        for number in stopping.STOP_SIGNALS:
            restored.callback(signal.signal, number, signal.getsignal(number))
        for name in {*launch_env.RANK_VARIABLES} - os.environ.keys():
            restored.callback(os.environ.pop, name, None)
        restored.callback(process_group.leave_process_group)
        yield
