"""The values of kernels that Inductor writes for a GPU, without one: Triton's interpreter runs them on CPU tensors.

    $NULL_GPU/run python interpreted_kernels.py write FOLDER        Inductor's code of each kernel that rounds to fp8
    TRITON_INTERPRET=1 python interpreted_kernels.py run FOLDER     prints a line of JSON for each that was compared

The interpreter's casts to 16 and to 8 bits do not round to the nearest number. PyTorch's, which do, replace them, as do
its own functions those of CUDA's library.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_tiedlora.parallel import kernels

WIDTHS = (192, 2080)  # a reduction in one piece, and one in a loop
ROWS, BLOCK = 6, 256


def calls(width: int, device: str) -> Iterator[tuple[str, bool, tuple[Any, ...]]]:
    """Every kernel that rounds, with and without the 16-bit result: its name, the flag, and arguments."""
    draw = torch.Generator().manual_seed(width)

    def drawn(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=draw)
        values[-1] *= 1e3
        return values.bfloat16().to(device)

    hidden, weight = drawn(ROWS, width), drawn(1, width)[0] / 1e3
    bias = weight.clone()  # Inductor's code takes tensors in another order
    gradient, gate_up = drawn(ROWS, width), drawn(ROWS, 2 * width)
    factors = torch.rand(1, 2 * width, generator=draw).to(device)
    for keeps in (False, True):
        for name in sorted(name for name in vars(kernels) if name.endswith("_rounded") and name[0] != "_"):
            if name == "gate_rounded":
                yield name, keeps, (gate_up, keeps)
            elif name == "gate_gradient_rounded":
                yield name, keeps, (gradient, gate_up, factors, keeps)
            else:
                yield name, keeps, (hidden, None, weight, None, 1e-5, keeps)
                yield f"{name} of LayerNorm", keeps, (hidden, None, weight, bias, 1e-5, keeps)
                yield f"{name} of a sum", keeps, (hidden, hidden.clone(), weight, None, 1e-5, keeps)


def write(folder: Path) -> None:
    """Compile each as for a run, and write the code that Inductor makes of it."""
    from torch._inductor.utils import run_and_get_code

    for width in WIDTHS:
        for name, keeps, arguments in calls(width, "cuda"):
            torch._dynamo.reset()
            kernel = getattr(kernels.Kernels().compiled(static_widths=True), name.split()[0])
            plain = getattr(kernels, name.split()[0])
            with torch.no_grad():
                _, (code,) = run_and_get_code(kernels.marking(kernel, kernels.has_rows(plain)), *arguments)
            (folder / f"{name} {width} {keeps}.py").write_text(code)


def run(folder: Path) -> None:
    """Compare the codes and scales of each with those of rounding the 16-bit numbers in plain PyTorch."""
    from triton.runtime import interpreter

    interpreter._convert_float = _cast
    for width in WIDTHS:
        kept: dict[str, torch.Tensor] = {}
        for name, keeps, arguments in reversed(list(calls(width, "cpu"))):  # those that keep first
            code = (folder / f"{name} {width} {keeps}.py").read_text()
            plain = getattr(kernels, name.split()[0])(*arguments)
            found: list[Any] = list(_called(code, [given for given in arguments if isinstance(given, torch.Tensor)]))
            if keeps:
                kept[name] = found[-3]
                torch.testing.assert_close(kept[name], plain[-3], rtol=2**-6, atol=1e-3)
            codes, scales = _rounded(kept[name], arguments[2] if "gradient" in name else None)
            equal = {
                "codes": torch.equal(found[-2].view(torch.uint8), codes.view(torch.uint8)),
                "scales": torch.equal(found[-1], scales),
            }
            print(json.dumps({"kernel": name, "width": width, "keeps": keeps, **equal}))


def _rounded(values: torch.Tensor, factors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.round_rows` as CUDA computes it: a division by a constant is a multiplication by its reciprocal."""
    rows = values.float() if factors is None else values.float() * factors
    scales = rows.abs().amax(1) * (1 / 448)
    return (rows / scales[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def _called(code: str, arguments: list[torch.Tensor]) -> tuple[Any, ...]:
    """Run Inductor's code for a GPU on the CPU."""
    code = re.sub(r"torch\.cuda\._DeviceGuard\(\d\)", "_nothing()", code)
    code = re.sub(r"torch\.cuda\.set_device\(\d\)|raise_if_.*|assert_alignment\(.*", "pass", code)
    code = re.sub(r"get_raw_stream\(\d\)", "0", code)
    code = re.sub(r"^(empty_strided_cuda|async_compile) = .*", "", code, flags=re.MULTILINE)
    code = re.sub(r"^(async_compile\.wait|del async_compile|from torch._C).*", "", code, flags=re.MULTILINE)
    given: dict[str, Any] = {
        "async_compile": SimpleNamespace(triton=_interpreted),
        "_nothing": torch.no_grad,
        "__name__": "code",
    }
    given["empty_strided_cuda"] = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    exec(compile(code, "code", "exec"), given)
    assert re.search(r"s\d+ = arg0_1", code), "the number of rows is an argument"
    result: tuple[Any, ...] = given["call"]([len(arguments[0]), *arguments])
    return result


def _interpreted(name: str, source: str, **_: Any) -> Any:
    """A kernel of Inductor with a method that runs it by Triton's interpreter, two rows at a time."""
    source = re.sub(r"triton_helpers\.set_driver_to_gpu\(\)|@triton_heuristics\.\w+\((.|\n)*?\n\)\n", "", source)
    width = re.search(r"r0_numel = (\d+)", source)
    assert width is not None
    source = source.replace("tl.range(0, r0_numel, R0_BLOCK)", f"range(0, {width[1]}, {BLOCK})")
    file = Path(sys.argv[2]) / f"{name[:60]}.py"  # Triton reads the source of its functions
    file.write_text(source.replace("libdevice.", "tl."))
    module: dict[str, Any] = {"__name__": name}
    exec(compile(file.read_text(), str(file), "exec"), module)
    blocks = {"XBLOCK": 2} | ({"R0_BLOCK": BLOCK} if "R0_BLOCK : tl.constexpr" in source else {})
    return SimpleNamespace(run=lambda *numbers, stream: module[name][(-(-numbers[-2] // 2), 1, 1)](*numbers, **blocks))


def _cast(numbers: Any, given: Any, wanted: Any, _: Any) -> Any:
    types = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8e4nv": torch.float8_e4m3fn, "fp16": torch.float16}
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    own = np.ascontiguousarray(numbers)
    tensor = torch.from_numpy(own.view(getattr(np, f"int{8 * own.itemsize}"))).view(types[str(given)])
    result = tensor.to(types[str(wanted)])
    return result.view(bits[result.itemsize]).numpy().view(getattr(np, f"uint{8 * result.itemsize}"))


if __name__ == "__main__":
    {"write": write, "run": run}[sys.argv[1]](Path(sys.argv[2]))
