"""Run lm_eval with the model `tiedlora`, a native adapter on its base model:

    python -m megatron_tiedlora.lm_eval --model tiedlora --model_args adapter=RUN/adapter --tasks hellaswag

All flags are lm_eval's own. `TiedLoraLM` lists the arguments of the model. In Python, import this module first:

    import lm_eval, megatron_tiedlora.lm_eval
    lm_eval.simple_evaluate("tiedlora", {"adapter": "RUN/adapter"}, tasks=["hellaswag"])

The plain command `lm_eval` cannot find the model: its table of models is fixed, and it neither reads entry points nor
imports a module that a flag names. So this module adds the model to the table.
"""

import sys

from megatron_tiedlora.base.installation import install_hint
from megatron_tiedlora.base.messages import UserError


def main(_: object = None) -> int:
    """Run lm_eval's command line, and return 0. Raise UserError if lm_eval is missing or an argument is wrong."""
    try:
        import megatron_tiedlora.integrations.lm_eval_model  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"this needs lm_eval and what it imports ({error}); {install_hint('lm-eval')}") from None
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    from megatron_tiedlora.config.cli import run_command

    run_command(main, sys.argv[1:])
else:
    import megatron_tiedlora.integrations.lm_eval_model  # noqa: F401
