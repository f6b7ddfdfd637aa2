"""Compute a run's number of steps from --epochs."""

import math
from fractions import Fraction

from megatron_tiedlora.base.messages import UserError, count_text
from megatron_tiedlora.config.fields import profiled_steps
from megatron_tiedlora.config.settings import Settings


def with_counted_steps(settings: Settings, num_samples: int) -> Settings:
    """Return the settings with --max_steps computed from --epochs, if given. --max_steps limits the default warm-up.

    A step uses the next --global_batch_size samples with every parallel configuration, and with or without packing. So
    an epoch has ceil(samples / --global_batch_size) steps, and its last step may begin the next epoch. The number of
    steps is computed exactly for any decimal value of --epochs, and rounded up:

        max_steps = ceil(epochs * training samples / global_batch_size)

    Raises:
        UserError: --warmup_steps is larger than this number of steps, or --profile begins after the last step.
    """
    if settings.epochs is None:
        return settings
    steps = max(1, math.ceil(Fraction(str(settings.epochs)) * num_samples / settings.global_batch_size))
    warmup = settings.warmup_steps
    if settings.profile is not None and profiled_steps(settings.profile)[0] > steps:
        raise UserError(
            f"--profile {settings.profile} begins after the {steps} steps of --epochs {settings.epochs:g}. Give earlier"
            " steps"
        )
    if warmup > steps and "warmup_steps" in settings.model_fields_set:
        raise UserError(
            f"--warmup_steps {warmup} is more than the {steps} steps of --epochs {settings.epochs:g}. Give fewer"
        )
    return settings.completed(max_steps=steps, warmup_steps=min(warmup, steps))


def epochs_of(settings: Settings, num_samples: int) -> float:
    """Return the mean number of times that a run sees each training sample."""
    return settings.max_steps * settings.global_batch_size / num_samples


def steps_in_words(settings: Settings, num_samples: int) -> str:
    """Return a text with the number of steps and the corresponding number of epochs."""
    steps, samples = count_text(settings.max_steps, "step"), count_text(num_samples, "training sample")
    if settings.epochs is None:
        return f"{steps}, {epochs_of(settings, num_samples):,.2f} passes over the {samples}"
    return f"{steps}, for --epochs {settings.epochs:g} of {samples} at {settings.global_batch_size} per step"
