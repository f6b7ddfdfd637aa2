"""The GPU kernel of the vLLM plugin: its values by Triton's interpreter, and its code compiled for three GPUs.

Triton comes with PyTorch's CUDA build. The interpreter computes products of bf16 wrongly: values are of fp16, fp32.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from null_gpu_figures import divides, is_wide
from support.tied_updates import (
    FEW,
    MANY,
    SIZES,
    SLOTS,
    Update,
    add_tied_update,
    check_update,
    interpreted,
    make_update,
)
from torch import Tensor

triton = pytest.importorskip("triton")
kernels = importlib.import_module("megatron_tiedlora.integrations.vllm.kernels")


class Wrapper:
    """What `GpuTokens` uses of vLLM's wrapper: the shrink in PyTorch, and the metadata of a batch.

    Tokens are sorted by slot, the base first. Buffers are as long as the longest batch and the most slots; what this
    batch does not use is as vLLM leaves it: slots -1, counts 0, and any tokens.
    """

    def __init__(self, mapping: tuple[int, ...]) -> None:
        slots = torch.tensor(mapping, dtype=torch.int32)
        used, counts = torch.unique(slots, return_counts=True)
        self.token_mapping_meta = self
        self.slots = slots
        self.sorted = torch.cat((slots.sort(stable=True).indices.int(), torch.full((9,), 10**6, dtype=torch.int32)))
        self.active = torch.full((SLOTS + 1,), -1, dtype=torch.int32)
        self.counts, self.starts = torch.zeros(SLOTS + 1).int(), torch.zeros(SLOTS + 2).int()
        self.active[: len(used)], self.counts[: len(used)] = used, counts.int()
        self.starts[1 : len(used) + 1] = counts.cumsum(0)
        self.no_adapter = torch.tensor([not (slots >= 0).any()])
        self.num_groups = torch.tensor([SLOTS + 1])

    def meta_args(self, token_nums: int, specialize_active_lora: bool) -> tuple[Tensor, ...]:
        assert not specialize_active_lora
        ordered = (self.slots[:token_nums], self.sorted[:token_nums])
        return (*ordered, self.counts, self.starts, self.active, self.no_adapter, self.num_groups)

    def add_shrink(self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float) -> None:
        (a,) = lora_a_stacked
        low = scale * torch.einsum("ti,tri->tr", x.float(), a[self.slots.clamp(min=0).long(), 0].float())
        y.copy_(low.masked_fill(self.slots[:, None] < 0, torch.nan))  # nobody may read the base's rows


@pytest.fixture
def by_interpreter() -> Iterator[None]:
    with interpreted(kernels):
        yield


@pytest.mark.usefixtures("by_interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["one u", "u of each slice"])
@pytest.mark.parametrize(("rank", "slices"), SIZES)
def test_values_are_those_of_fp64(rank: int, slices: tuple[int, ...], shared: bool, dtype: torch.dtype) -> None:
    for mapping in (MANY, FEW):
        update = make_update(mapping, rank, slices, 1 if shared else len(slices), dtype)
        check_update(partial(add_tied_update, kernels), Wrapper(mapping), update)


@pytest.mark.usefixtures("by_interpreter")
def test_u_multiplies_before_the_values_are_rounded() -> None:
    """A x may be larger than an fp16 number if u makes it smaller."""
    update = make_update(FEW, 8, (128,), 1, torch.float16)
    large = Update(**{**vars(update), "x": 500 * update.x, "a": 500 * update.a, "u": update.u / 250_000})
    assert float((large.a[0, 0].double() @ large.x[2].double()).abs().max()) > 65_504
    check_update(partial(add_tied_update, kernels), Wrapper(FEW), large)


@pytest.mark.usefixtures("by_interpreter")
def test_y_is_rounded_once() -> None:
    """Of numbers so short that fp32 computes exactly, every bit is known."""
    update = make_update(FEW, 8, (128,), 1, torch.float16)
    steps = {"x": 1, "a": 1 / 8, "u": 1 / 4, "b": 1 / 4, "v": 1 / 8, "y": 1 / 8}
    short = {name: (getattr(update, name) / step).round() * step for name, step in steps.items()}
    exact = Update(**{**vars(update), **short})
    y = exact.y.clone()
    add_tied_update(kernels, Wrapper(FEW), y, *exact.rest)
    assert torch.equal(y, exact.expected().to(y.dtype))


@pytest.mark.usefixtures("by_interpreter")
def test_a_batch_without_adapters_is_left_alone() -> None:
    """Metadata of such a batch are those of the one before it, beside the flag."""
    update = make_update(FEW, 8, (128,), 1, torch.float16)
    wrapper = Wrapper(FEW)
    wrapper.no_adapter[0] = True
    y = update.y.clone()
    add_tied_update(kernels, wrapper, y, *update.rest)
    assert torch.equal(y, update.y)


@pytest.mark.usefixtures("by_interpreter")
def test_torch_compile_sees_one_operator_for_all_batches() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # which makes mutations explicit

    def layer(wrapper: Wrapper, update: Update) -> Tensor:
        y = update.y + 0
        add_tied_update(kernels, wrapper, y, *update.rest)
        return y

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for mapping in (MANY, FEW, MANY[:40]):
        update = make_update(mapping, 8, (200, 72, 72), 3, torch.float32)
        assert torch.equal(compiled(Wrapper(mapping), update), layer(Wrapper(mapping), update))
    calls = [node.target for graph in graphs for node in graph.graph.nodes if "add_expanded" in str(node.target)]
    assert calls == [torch.ops.tied_lora.add_expanded], calls


def compiled_for(capability: int, update: Update, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """The kernel as a call would compile it for a GPU, and the options of that call."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given: list[Any] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *tensors, **options: given.extend((tensors, options))

    plain = kernels._expand_tile
    monkeypatch.setattr(kernels, "_expand_tile", Recorded())
    wrapper = Wrapper(update.mapping)
    add_tied_update(kernels, wrapper, update.y, *update.rest)
    monkeypatch.undo()
    tensors, options = given
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
    constants = {name: value for name, value in options.items() if name.isupper()}
    signature = dict(zip(plain.arg_names, [types[tensor.dtype] for tensor in tensors], strict=False))
    aligned = {(number,): [["tt.divisibility", 16]] for number in range(len(tensors))}
    source = ASTSource(plain, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    found = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": options["num_warps"]})
    return found, options


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("rank", "slices"), [(8, (4096, 1024, 1024)), (64, (576, 192, 192)), (128, (11008,))])
def test_code_for_gpus_spills_nothing_and_is_wide(
    capability: int, rank: int, slices: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tiles of y are loaded and stored, and those of B loaded, 16 bytes at a time."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for mapping in (MANY, FEW):
        update = make_update(mapping, rank, slices, len(slices), torch.bfloat16, width=16)
        found, options = compiled_for(capability, update, monkeypatch)
        (tmp_path / "cubin").write_bytes(found.asm["cubin"])
        said = subprocess.run([tool, "-res-usage", tmp_path / "cubin"], capture_output=True, text=True, check=True)
        used = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}
        assert used["STACK"] == used["LOCAL"] == 0 and 0 < used["REG"] <= 160, used
        ptx = found.asm["ptx"]
        assert is_wide(ptx) and not divides(ptx)
        threads = 32 * options["num_warps"]
        tile = options["BLOCK_M"] * options["BLOCK_N"] * update.y.itemsize
        stores, wide_stores = re.findall(r"st\.global\S*", ptx), re.findall(r"st\.global\S*v4\.b32", ptx)
        assert stores == wide_stores and len(stores) * 16 * threads == tile
        loads = re.findall(r"ld\.global\S*v4\.b32|cp\.async\.cg\.shared\.global .* 0x10", ptx)
        b_tile = options["BLOCK_K"] * options["BLOCK_N"] * update.b.itemsize
        assert len(loads) * 16 * threads >= tile + b_tile, (len(loads), used)
