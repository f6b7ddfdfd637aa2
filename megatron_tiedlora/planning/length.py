"""How long samples and runs are: --max_length by default, and the steps of --epochs.

A step takes the next --global_batch_size samples, whatever the parallel layout and however packing puts them into rows.
So an epoch has ceil(samples / --global_batch_size) steps, and its last step may begin the next epoch:

    max_steps = ceil(epochs * training samples / global_batch_size)
"""

from __future__ import annotations

import math
from fractions import Fraction

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.settings import Settings, profiled_steps
from megatron_tiedlora.data.token_dataset import TokenDataset

MANY_CUT = 0.01  # of the training prompts
MANY_EPOCHS = 20


def with_models_length(settings: Settings, source: ModelSource) -> Settings:
    """The settings with a --max_length that the model can have, if none was given."""
    limit = source.shape.limit.tokens
    if "max_length" in settings.model_fields_set or settings.max_length <= limit:
        return settings
    return settings.completed(max_length=limit)


def steps_of_epochs(epochs: float, *, num_samples: int, global_batch_size: int) -> int:
    """The number of steps in which each sample is seen `epochs` times on average, rounded up. Exact for any decimal."""
    return max(1, math.ceil(Fraction(str(epochs)) * num_samples / global_batch_size))


def with_counted_steps(settings: Settings, num_samples: int) -> Settings:
    """The settings with the number of steps of --epochs, if that is given. The default warm-up is shortened to it.

    Raises:
        UserError: --warmup_steps is more than that, or --profile begins after it.
    """
    if settings.epochs is None:
        return settings
    steps = steps_of_epochs(settings.epochs, num_samples=num_samples, global_batch_size=settings.global_batch_size)
    warmup = settings.warmup_steps
    if settings.profile is not None and profiled_steps(settings.profile)[0] > steps:
        raise UserError(
            f"--profile {settings.profile} begins after the {steps} steps of --epochs {settings.epochs:g}; give earlier"
            " steps"
        )
    if warmup > steps and "warmup_steps" in settings.model_fields_set:
        raise UserError(
            f"--warmup_steps {warmup} is more than the {steps} steps of --epochs {settings.epochs:g}; lower it"
        )
    return settings.completed(max_steps=steps, warmup_steps=min(warmup, steps))


def epochs_of(settings: Settings, num_samples: int) -> float:
    """How often a run sees each training sample, on average."""
    return settings.max_steps * settings.global_batch_size / num_samples


def steps_in_words(settings: Settings, num_samples: int) -> str:
    """The number of steps, and how it follows from --epochs, or how many epochs follow from it."""
    steps, samples = count_text(settings.max_steps, "step"), count_text(num_samples, "training sample")
    if settings.epochs is None:
        return f"{steps}, {epochs_of(settings, num_samples):,.2f} passes over the {samples}"
    return (
        f"{steps}, for --epochs {settings.epochs:g} of {samples} at {settings.global_batch_size}"
        " per step"
    )


def length_warnings(settings: Settings, train: TokenDataset) -> list[str]:
    """What a user probably does not want: many prompts that are cut, or so many epochs that the run learns by heart."""
    found = []
    cut, epochs = train.truncated_prompts, epochs_of(settings, len(train))
    if cut > MANY_CUT * len(train):
        found.append(
            f"{cut:,} of {len(train):,} training prompts ({cut / len(train):.1%}) lose their middle at --max_length"
            f" {settings.max_length}; raise it if the model allows, or shorten the prompts"
        )
    if epochs > MANY_EPOCHS:
        instead = f"--epochs 3 in place of --max_steps {settings.max_steps} would be shorter"
        advice = instead if settings.epochs is None else "a lower value of --epochs makes it shorter"
        found.append(f"the run sees each of the {len(train):,} training samples {epochs:,.1f} times; {advice}")
    return found
