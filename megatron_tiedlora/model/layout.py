"""What a layout must fulfil for a model, checked before a weight is read: refusals name the numbers and the fix."""

from __future__ import annotations

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.parallel.grid import Grid


def check_model_layout(shape: ModelShape, grid: Grid) -> None:
    """Check that the model can be cut over the grid.

    Raises:
        UserError: the first thing that does not fit.
    """
    tp, pp = grid.tp_size, grid.pp_size
    sizes = {
        "attention heads": shape.heads.num,
        "key-value heads": shape.heads.num_kv,
        "hidden size": shape.hidden_size,
        "feed-forward width": shape.intermediate_size,
    }
    for name, size in sizes.items():
        if size % tp:
            possible = [n for n in range(1, shape.heads.num_kv + 1) if all(s % n == 0 for s in sizes.values())]
            raise UserError(
                f"--tensor_parallel {tp} does not divide the model's {size} ({name}); possible are"
                f" {', '.join(map(str, possible))}"
            )
    if (tp - 1) * -(-shape.vocab_size // tp) >= shape.vocab_size:
        raise UserError(
            f"--tensor_parallel {tp}: a vocabulary of {shape.vocab_size} leaves a rank without a row; give fewer"
        )
    if pp > shape.num_layers:
        raise UserError(
            f"--pipeline_parallel {pp}: the model has {shape.num_layers} layers and every stage needs one; give at"
            f" most {shape.num_layers}"
        )
