"""Run lm_eval with the model `tiedlora`, which is a native adapter on its base model:

    python -m megatron_tiedlora.lm_eval --model tiedlora --model_args adapter=RUN/adapter --tasks hellaswag

All flags are lm_eval's own. The arguments of the model are those of `TiedLoraLM`. In Python, import this module first:

    import lm_eval, megatron_tiedlora.lm_eval
    lm_eval.simple_evaluate("tiedlora", {"adapter": "RUN/adapter"}, tasks=["hellaswag"])

The plain command `lm_eval` cannot know the model: it reads its table of models from its own package, and it neither
reads entry points nor imports a module that a flag names. So this module registers the model and calls its `main`.
"""

import sys
from collections.abc import Sequence

from megatron_tiedlora.base.messages import UserError


def register() -> None:
    """Register the model in lm_eval. Raise ImportError if lm_eval is not installed."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ModuleNotFoundError as error:
        said = f"megatron_tiedlora.lm_eval needs lm_eval with its models of transformers ({error})"
        raise ImportError(f"{said}; run `pip install 'lm_eval[hf]'`") from None
    import megatron_tiedlora.integrations.lm_eval_model  # noqa: F401


def main(argv: Sequence[str]) -> int:
    """Run lm_eval's command line with the arguments `argv`. Raise UserError if lm_eval or an argument is missing."""
    try:
        register()
    except ImportError as error:
        raise UserError(error) from None
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = argv
    cli_evaluate()
    return 0


if __name__ == "__main__":
    from megatron_tiedlora.config.cli import run_command

    run_command(main, sys.argv[1:])
else:
    register()
