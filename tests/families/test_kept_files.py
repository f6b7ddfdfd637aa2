"""What an earlier revision wrote is read as before: an adapter, a merged folder, a checkpoint.

tests/data/run_before_families is a LLaMA with Llama 3's rotation, biases and tied embeddings; an adapter of it, merged
and exported by the revision before there were families; and the checkpoints of another run of 4 steps on it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.folders import ROOT
from support.run_files import files_of, truncate
from support.run_helpers import run_ranks
from torch.testing import assert_close

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.resume import load_checkpoint
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import peft_tensors
from megatron_tiedlora.convert.inputs import check_base
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.verify import verify_export

KEPT = ROOT / "tests" / "data" / "run_before_families"


def test_the_adapter_is_of_this_base_and_verifies() -> None:
    source, adapter = find_model(str(KEPT / "base")), load_native_adapter(KEPT / "adapter")
    assert source.base_hash == adapter.base_identity.base_hash
    assert not check_base(source, adapter, uses_tokenizer=True, differs=False)[1]
    found = verify_export(source, adapter, merged=KEPT / "merged", peft=KEPT / "peft")
    # Of the bits only those of untouched tensors: processors may sum the update in another order.
    assert all("base + adapter" in difference for difference in found.bits[0].differences)
    assert all(row.passed for row in found.logits), found.report()


def test_merged_folder_and_export_are_written_as_before(tmp_path: Path) -> None:
    source, adapter = find_model(str(KEPT / "base")), load_native_adapter(KEPT / "adapter")
    merge_adapter(source, adapter, tmp_path / "merged")
    assert files_of(tmp_path / "merged").keys() == files_of(KEPT / "merged").keys()
    merged, kept = (load_file(folder / "merged/model.safetensors") for folder in (tmp_path, KEPT))
    assert_close(merged, kept, rtol=2**-7, atol=0)  # processors may sum in another order: one rounding to bf16
    exported = load_file(KEPT / "peft/adapter_model.safetensors")
    assert_close(peft_tensors(source, adapter, rank=adapter.config.rank), exported, rtol=1e-6, atol=0)


@pytest.mark.distributed
def test_the_checkpoint_goes_on_to_the_adapter_of_then(tmp_path: Path) -> None:
    """Two more steps; the processor may be another one, which sums in another order."""
    for name in ("base", "checkpoints", "train.jsonl"):
        (shutil.copytree if (KEPT / name).is_dir() else shutil.copyfile)(KEPT / name, tmp_path / name)
    flags = (
        "--dtype fp32 --rank 2 --max_length 64 --global_batch_size 2 --micro_batch_size 1 --max_steps 4"
        " --save_interval 2 --eval_interval 2 --learning_rate 0.02"
    )
    own = ["--model=base", "--train_file=train.jsonl", "--resume=checkpoints/step_2", "--output_dir=run"]
    run_ranks([*own, *flags.split()], folder=tmp_path).expect(0)
    found, kept = (load_checkpoint(folder / "checkpoints/step_4") for folder in (tmp_path / "run", KEPT))
    assert (found.adapter.config, found.adapter.base_identity) == (kept.adapter.config, kept.adapter.base_identity)
    assert found.settings["data_sha256"] == kept.settings["data_sha256"]
    assert found.progress.best_metric == pytest.approx(kept.progress.best_metric, rel=1e-5)
    assert_close(found.adapter.state, kept.adapter.state, rtol=1e-4, atol=1e-6)


def test_a_kept_adapter_on_a_damaged_base_is_rejected(tmp_path: Path) -> None:
    shutil.copytree(KEPT / "base", tmp_path / "base")
    truncate(tmp_path / "base/model.safetensors")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        merge_adapter(find_model(str(tmp_path / "base")), load_native_adapter(KEPT / "adapter"), tmp_path / "merged")
