"""Add the tied methods to ms-swift as tuners. Write a file plugin.py with the line

    import megatron_tiedlora.integrations.swift

and give it to swift; `swift infer --adapters ...` reads both names from the folder of the run:

    swift sft --external_plugins plugin.py --tuner_type tl6 --lora_rank 8 --lora_alpha 8 --target_modules qkv o_proj ...

`tl1` to `tl6` are methods of the paper. `--target_modules` takes this package's targets; swift's default, all-linear,
is all of them. `--model_kwargs '{"tied_lora_layers": [1, 3]}'` chooses layers. The initial values follow `--seed`.
"""

import os
import re
from dataclasses import fields
from typing import Any

from peft import get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from megatron_tiedlora.base.messages import UserError, naming, shown
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.peft import TiedLoraConfig

if __name__ != "megatron_tiedlora.integrations.swift":  # swift would also look for modules in this folder
    raise UserError(f"--external_plugins {__file__}: give a file with `import megatron_tiedlora.integrations.swift`")
_LORA_ONLY = ("lora_dropout", "lora_bias", "lora_dtype", "lorap_lr_ratio", "use_rslora", "use_dora", "init_weights")


def swift_config(args: Any) -> TiedLoraConfig:
    """Return the PEFT config that swift's flags describe. Raise UserError, with the flag, on those of other tuners."""
    for one in fields(args):
        value, same = getattr(args, one.name), {"none", "[]", "0", "0.0", str(one.default).lower()}
        if one.name in (*_LORA_ONLY, "target_parameters", "modules_to_save") and str(value).lower() not in same:
            raise UserError(f"--{one.name} {shown(value)} is for LoRA only; remove it")
    targets = "all" if args.target_modules == ["all-linear"] else args.target_modules
    given = os.environ.get("TIED_LORA_LAYERS")  # swift turns --model_kwargs into variables
    if given and not re.fullmatch(r"\[\d+(, *\d+)*\]", given):
        raise UserError(f"--model_kwargs tied_lora_layers {given}: is not a list of layers; give one like [1, 3]")
    layers = [int(number) for number in re.findall(r"\d+", given)] if given else None
    own = {"method": args.tuner_type, "r": args.lora_rank, "alpha": args.lora_alpha, "seed": args.seed}
    said = "r is --lora_rank, alpha is --lora_alpha, targets is --target_modules"
    with naming(f"--tuner_type {args.tuner_type} ({said})"):
        config = TiedLoraConfig(**own, layers=layers, targets=targets, task_type=args.task_type.upper())
    return config


class TiedLoraTuner(PeftTuner):
    """The tuner of swift that adds a new adapter. Its base class saves and loads adapters by PEFT."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        """Return the model with a new adapter."""
        return get_peft_model(model, swift_config(args))


tuners_map.update(dict.fromkeys(set(METHOD_NAMES) - {"lora", "vera"}, TiedLoraTuner))  # swift has tuners of these names
