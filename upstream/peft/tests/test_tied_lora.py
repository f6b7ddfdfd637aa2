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

# This test file is for tests specific to Tied-LoRA: which modules share a factor, and what each method trains.

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import PeftModel, TiedLoraConfig, get_peft_model, inject_adapter_in_model


TARGETS = ["q_proj", "k_proj", "v_proj"]
METHODS = ["tl1", "tl2", "tl3", "tl4", "tl5", "tl6"]
LAYERS, WIDTH, ROWS, R = 3, 12, {"q_proj": 12, "k_proj": 8, "v_proj": 8}, 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name, rows in ROWS.items():
            setattr(self, name, nn.Linear(WIDTH, rows))
        self.o_proj = nn.Linear(sum(ROWS.values()), WIDTH)

    def forward(self, X):
        return X + self.o_proj(torch.cat([self.q_proj(X), self.k_proj(X), self.v_proj(X)], dim=-1).tanh())


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Attention() for _ in range(LAYERS)])

    def forward(self, X):
        for layer in self.model.layers:
            X = layer(X)
        return X


class TestTiedLora:
    @pytest.fixture
    def decoder(self):
        torch.manual_seed(0)
        return Decoder()

    @pytest.fixture
    def X(self):
        return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))

    def get_model(self, decoder, adapter_name="default", **kwargs):
        config = TiedLoraConfig(**{"target_modules": TARGETS, "r": R, "init_weights": False, **kwargs})
        return get_peft_model(copy.deepcopy(decoder), config, adapter_name=adapter_name)

    @pytest.mark.parametrize("method", METHODS)
    def test_trained_parameters(self, decoder, X, method):
        rows = sum(ROWS.values())
        sizes = {"A": R * WIDTH, "B": rows * R, "u": LAYERS * R, "v": LAYERS * rows}
        trained = {"tl1": "A", "tl2": "Auv", "tl3": "B", "tl4": "Bu", "tl5": "AB", "tl6": "ABuv"}[method]
        model = self.get_model(decoder, method=method)
        assert model.get_nb_trainable_parameters()[0] == sum(sizes[name] for name in trained)
        model(X).square().sum().backward()
        for name, param in model.named_parameters():
            assert (param.grad is not None) == ("tied_lora_" in name)
            if param.grad is not None:
                assert param.grad.abs().max() > 0

    @pytest.mark.parametrize("method", METHODS)
    def test_starts_as_base_model(self, decoder, X, method):
        model = self.get_model(decoder, method=method, init_weights=True)
        assert torch.equal(model(X), decoder(X)) == (method != "tl1")

    @pytest.mark.parametrize("method", METHODS)
    def test_shared_factors_are_saved_once(self, decoder, X, method, tmp_path):
        model = self.get_model(decoder, method=method).eval()
        output = model(X)
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "adapter_model.safetensors")
        count = {"A": 1, "B": 3, "u": LAYERS, "v": 3 * LAYERS}
        for name in "ABuv":
            exists = name in "AB" or name in {"tl2": "uv", "tl4": "u", "tl6": "uv"}.get(method, "")
            assert sum(key.endswith(f"_{name}") for key in state) == exists * count[name]
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(
                copy.deepcopy(decoder), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
            ).eval()
            assert torch.equal(loaded(X), output)

    def test_update_of_each_weight(self, decoder):
        model = self.get_model(decoder, tied_lora_alpha=6)
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.normal_()
        A = model.base_model.model.model.layers[0].q_proj.tied_lora_A["default"]
        for layer, base in zip(model.base_model.model.model.layers, decoder.model.layers):
            u = layer.q_proj.tied_lora_u["default"]
            for name in TARGETS:
                first, module = getattr(model.base_model.model.model.layers[0], name), getattr(layer, name)
                B, v = first.tied_lora_B["default"], module.tied_lora_v["default"]
                delta = 6 / R * torch.diag(v) @ B @ torch.diag(u) @ A
                torch.testing.assert_close(module.get_delta_weight("default"), delta)
                module.merge()
                torch.testing.assert_close(module.get_base_layer().weight, getattr(base, name).weight + delta)

    def test_fused_modules(self, decoder):
        # without fused modules, q, k and v have an A and a u each
        rows = sum(ROWS.values())
        model = self.get_model(decoder, fused_modules=[])
        assert model.get_nb_trainable_parameters()[0] == 3 * R * WIDTH + rows * R + LAYERS * (3 * R + rows)

    def test_modules_of_different_shapes_share_nothing(self):
        mlp = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 2))
        config = TiedLoraConfig(target_modules=["0", "1", "2", "3"], r=R, method="tl5")
        model = get_peft_model(mlp, config)
        # two A, as three layers have 20 inputs, and three B, as two layers have the same shape
        assert model.get_nb_trainable_parameters()[0] == R * (10 + 20) + R * (20 + 20 + 2)
        model(torch.randn(5, 10))  # does not raise

    def test_adapters_share_nothing_with_each_other(self, decoder, X):
        model = self.get_model(decoder, "first", layers_to_transform=[0, 1])
        only_first = model(X)
        config = TiedLoraConfig(
            target_modules=["k_proj", "v_proj"], r=3, init_weights=False, layers_to_transform=[1, 2]
        )
        model.add_adapter("second", config)
        assert torch.equal(model(X), only_first)
        model.set_adapter("second")
        only_second = model(X)
        assert not torch.allclose(only_second, only_first)
        model.set_adapter("first")
        assert torch.equal(model(X), only_first)
        model.set_adapter("second")
        model.delete_adapter("first")
        assert not any(".first" in key for key in model.state_dict())
        assert torch.equal(model(X), only_second)

    def test_inject_adapter_in_model(self, decoder, X):
        # shared factors belong to the layers, so that they are trained without a PeftModel, too
        model = inject_adapter_in_model(TiedLoraConfig(target_modules=TARGETS, r=R, init_weights=False), decoder)
        names = [name for name, param in model.named_parameters() if param.requires_grad]
        assert sum("tied_lora_A" in name for name in names) == 1
        model(X).sum().backward()
        assert model.model.layers[0].q_proj.tied_lora_A["default"].grad.abs().max() > 0

    def test_unknown_method_raises(self):
        with pytest.raises(ValueError, match="`method` should be one of .* but the value passed is tl7"):
            TiedLoraConfig(method="tl7")
