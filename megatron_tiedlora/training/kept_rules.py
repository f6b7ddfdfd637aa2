"""A run that is resumed reads its rows by the rules that it began with, which its checkpoint names."""

from __future__ import annotations

from megatron_tiedlora.config.data_fields import FIRST_DATA_RULES
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.training.init_from import recorded_run


def with_kept_rules(settings: Settings) -> Settings:
    """The settings, with the first --data_rules if they resume a run of version 0.1.

    A host that does not see the run's folder needs that flag from the user.

    Raises:
        UserError: a setting contradicts these rules.
    """
    if settings.resume == "none" or "data_rules" in settings.model_fields_set:
        return settings
    recorded = recorded_run(settings)
    if recorded is None or "data_rules" in recorded:
        return settings
    return make_settings({**settings.model_dump(exclude_unset=True), "data_rules": FIRST_DATA_RULES})
