"""Settings of a checkpoint that contradict those of the run that continues it."""

from __future__ import annotations

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.training.plan import check_resumed_settings, plan_run


@pytest.mark.parametrize("earlier", [False, True])
def test_other_targets_are_rejected(earlier: bool) -> None:
    """A checkpoint of an earlier version, whose settings have no targets, is one of QKV alone."""
    values = {"model": "llama2-7b", "train_file": "x", "dry_run": True}
    before, now = (
        plan_run(make_settings({**values, "targets": targets}), rank=0, world_size=1, weights=False)
        for targets in ("qkv", "qkv,o_proj")
    )
    saved = {**before.resolved_settings(), "data_sha256": "1"}
    if earlier:
        del saved["targets"]
    check_resumed_settings(before, saved, data_sha256="1", source="step_4")
    with pytest.raises(UserError) as error:
        check_resumed_settings(now, saved, data_sha256="1", source="step_4")
    assert "step_4: trained with --targets qkv, but now it is qkv,o_proj" in str(error.value)
