"""The plugin in the real vLLM: all recorded names are there, and vLLM creates this package's manager."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.folders import ROOT

pytestmark = pytest.mark.vllm
MIXIN = "vllm.v1.worker.lora_model_runner_mixin"


def run(code: str, **variables: str) -> list[str]:
    """The lines that code prints in a new process; it may log no warning."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "WARNING", **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "tied_lora" not in done.stderr, done.stderr
    return done.stdout.splitlines()


def test_vllm_has_the_recorded_names() -> None:
    parts = json.loads((ROOT / "megatron_tiedlora/integrations/vllm/vllm_names.json").read_text())
    code = (
        "import vllm.v1.worker.lora_model_runner_mixin\n"
        "from megatron_tiedlora.integrations.vllm.plugin import TESTED, differences\n"
        f"print([*[line for part in {[*parts]} for line in differences(part)]])\n"
        "import vllm\n"
        "print(TESTED[0] <= vllm.__version_tuple__[:2] <= TESTED[1])\n"
    )
    assert run(code)[-2:] == ["[]", "True"]


def test_the_manager_of_a_server_is_this_package_s() -> None:
    """The check runs when vLLM creates its manager."""
    code = (
        "import sys, vllm\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from megatron_tiedlora.integrations.vllm import plugin\n"
        "plugin.register()\n"
        "print('torch' in sys.modules, 'megatron_tiedlora.integrations.vllm.manager' in sys.modules)\n"
        f"import {MIXIN} as mixin\n"
        "from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager as stock\n"
        "replaced = mixin.LRUCacheWorkerLoRAManager\n"
        "print(replaced is stock, replaced.__wrapped__ is stock)\n"
        "ours = plugin._manager_class(stock)\n"
        "print(ours.__module__, issubclass(ours, stock), ours is stock)\n"
    )
    lines = run(code)[-3:]
    assert lines == ["True False", "False True", "megatron_tiedlora.integrations.vllm.manager True False"]


def test_vllm_with_another_signature_keeps_its_own_manager() -> None:
    """The warning reaches the server's log."""
    code = (
        "import vllm.lora.model_manager as manager\n"
        "manager.LoRAModelManager._add_adapter = lambda self, lora, stream: True\n"
        "from megatron_tiedlora.integrations.vllm import plugin\n"
        "plugin.register()\n"
        f"import {MIXIN} as mixin\n"
        "stock = mixin.LRUCacheWorkerLoRAManager.__wrapped__\n"
        "print(plugin._manager_class(stock) is stock)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
    said = "LRUCacheLoRAModelManager._add_adapter has (self, lora, stream), not (self, lora)"
    output = done.stdout + done.stderr
    assert said in output and "This server loads no native adapters and VeRA. Use vLLM 0.26 to 0.32" in output
