"""What a layout must fulfil for a model, checked before a weight is read: refusals name the numbers and the fix."""

from __future__ import annotations

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.model.families.llama import LlamaConfig
from megatron_tiedlora.parallel.grid import Grid


def check_model_layout(config: LlamaConfig, grid: Grid) -> None:
    """Check that the model can be cut over the grid.

    Raises:
        UserError: the first thing that does not fit.
    """
    tp, pp = grid.tp_size, grid.pp_size
    sizes = {
        "attention heads": config.num_heads,
        "key-value heads": config.num_kv_heads,
        "hidden size": config.hidden_size,
        "feed-forward width": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % tp:
            possible = [n for n in range(1, config.num_kv_heads + 1) if all(s % n == 0 for s in sizes.values())]
            raise UserError(
                f"--tensor_parallel {tp} does not divide the model's {size} ({name}); possible are"
                f" {', '.join(map(str, possible))}"
            )
    if (tp - 1) * -(-config.vocab_size // tp) >= config.vocab_size:
        raise UserError(
            f"--tensor_parallel {tp}: a vocabulary of {config.vocab_size} leaves a rank without a row; give fewer"
        )
    if pp > config.num_layers:
        raise UserError(
            f"--pipeline_parallel {pp}: the model has {config.num_layers} layers and every stage needs one; give at"
            f" most {config.num_layers}"
        )
