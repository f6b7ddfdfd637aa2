# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from dataclasses import dataclass, field

from peft.config import PeftConfig
from peft.utils import PeftType


# The trained factors of each method of the paper. A and B that are not trained are frozen at random values; u and v that
# are not trained are ones and do not exist as tensors.
TRAINED_FACTORS: dict[str, tuple[str, ...]] = {
    "tl1": ("A",),
    "tl2": ("A", "u", "v"),
    "tl3": ("B",),
    "tl4": ("B", "u"),
    "tl5": ("A", "B"),
    "tl6": ("A", "B", "u", "v"),
}


def _default_fused_modules() -> list[list[str]]:
    return [["q_proj", "k_proj", "v_proj"], ["query", "key", "value"], ["q", "k", "v"], ["gate_proj", "up_proj"]]


@dataclass
class TiedLoraConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`TiedLoraModel`].

    Paper: https://huggingface.co/papers/2311.09578.

    Args:
        method (`str`, *optional*, defaults to `"tl6"`):
            The variant of the paper, which decides what is trained: `"tl1"` (A), `"tl2"` (A, u, v), `"tl3"` (B),
            `"tl4"` (B, u), `"tl5"` (A, B) or `"tl6"` (A, B, u, v). All of them but `"tl1"` start as the base model.
            The two other variants of the paper are the methods LoRA and VeRA.
        r (`int`, *optional*, defaults to `8`):
            The rank of A and B.
        target_modules (`Union[List[str], str]`):
            The names of the modules to adapt, or a regex. Only linear layers and `Conv1D` are supported.
        exclude_modules (`Union[List[str], str]`):
            The names of the modules not to adapt, or a regex.
        fused_modules (`List[List[str]]`):
            Names of modules that count as one fused module if they have the same parent, as the query, key and value
            projections in the paper. The modules of a list share A and, in each layer, u; each of them has its own B
            and v. The default lists the common names of the query, key and value projections, and of the gate and up
            projections. Pass `[]` to tie each module only to its counterparts in other layers.
        tied_lora_alpha (`float`):
            The update is scaled by `tied_lora_alpha / r`. Defaults to `r`, i.e. no scaling.
        tied_lora_dropout (`float`):
            The dropout probability of the input of A.
        fan_in_fan_out (`bool`):
            Set this to True if the layers to adapt store their weights as (fan_in, fan_out), like the `Conv1D` of GPT-2.
        bias (`str`):
            The biases to train: 'none', 'all' or 'tied_lora_only'. If biases are trained, the model differs from the
            base model even when its adapters are disabled.
        modules_to_save (`List[str]`):
            Modules apart from the adapted ones that are trained and saved, e.g. a classification head.
        init_weights (`bool`):
            Whether to initialize the factors such that training starts as described in the paper. With `False`, the
            update is not zero at the start, which is only useful for testing.
        layers_to_transform (`Union[List[int], int]`):
            The indices of the layers to adapt. All layers are adapted by default.
        layers_pattern (`Union[List[str], str]`):
            The name of the `nn.ModuleList` of the layers, e.g. `'layers'` or `'h'`. Used with `layers_to_transform`.
    """

    method: str = field(
        default="tl6",
        metadata={"help": "The variant of the paper, which decides what is trained: tl1, tl2, tl3, tl4, tl5 or tl6."},
    )
    r: int = field(default=8, metadata={"help": "The rank of A and B."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "List of module names or regex expression of the module names to adapt."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "List of module names or regex expression of the module names not to adapt."}
    )
    fused_modules: list[list[str]] = field(
        default_factory=_default_fused_modules,
        metadata={"help": "Lists of names of modules that share A and u if they have the same parent."},
    )
    tied_lora_alpha: float | None = field(
        default=None, metadata={"help": "The update is scaled by tied_lora_alpha / r. Defaults to r."}
    )
    tied_lora_dropout: float = field(default=0.0, metadata={"help": "The dropout probability of the input of A."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Set this to True if the layers store their weights as (fan_in, fan_out)."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'tied_lora_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules apart from the adapted ones that are trained and saved."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Whether to initialize the factors as usual. False is only for testing."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "The indices of the layers to adapt. All layers are adapted by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the nn.ModuleList of the layers, e.g. 'layers' or 'h'."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.TIED_LORA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.method not in TRAINED_FACTORS:
            raise ValueError(
                f"`method` should be one of {list(TRAINED_FACTORS)} but the value passed is {self.method}"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` has an effect only if `layers_to_transform` is also specified.")
