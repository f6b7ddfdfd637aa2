"""Choose a fused kernel for causal attention on a GPU, and call it once for all documents of all rows.

A row that is not packed is one document, so packed and unpacked rows use the same code. This module uses the first
kernel of this list that supports the device, the dtype and the head dim. The list starts with the kernel that reaches
the largest share of the peak (planning/machines.yaml):

    FlashAttention 3            16 bits, compute capability 9.x, if `flash_attn_interface` is installed
    FlashAttention 4            16 bits, 9.0 to 12.x, heads of up to 128, if `flash-attn-4` is installed
    PyTorch's cuDNN             16 bits, 9.0 to 10.x, heads of up to 128; only for documents of one length, a multiple
                                of 128; all others get the next kernel that supports them
    flash_attn                  16 bits, from 8.0 on, if FlashAttention 2 is installed
    PyTorch's flash             16 bits, from 8.0 on
    PyTorch's memory-efficient  fp32, and 16 bits on older GPUs or with heads of more than 256; copies keys and values
                                for every query head that shares them
    one after another           PyTorch's attention, document by document, in all other cases
    tiles of queries            `cpu_attention.py`, if scores have a window or a cap that no kernel above supports

The backward pass of PyTorch's memory-efficient kernel does not get the window of its forward pass. With caps, that of
FlashAttention 4 is wrong or hangs (flash-attention pull request 2544 and issue 2466), and that of 2 exists since 2.6.2.

cuDNN builds a plan for each new shape, in about 40 ms. PyTorch keeps the plans of whole rows; multiples of 128 limit
their number, and other lengths failed in some versions (pytorch issues 169849 and 196678). For documents of different
lengths, `_cudnn_attention_forward` takes offsets, but PyTorch 2.10 to 2.13 build its plan at every call (pytorch pull
request 191576), and later versions keep one for each number of tokens.

PyTorch's kernels are called as operators, whose first arguments are the same in versions 2.6 to 2.15. PyTorch's public
variable-length attention function (since 2.10) is not used, because its signature differs between versions and it may
choose cuDNN. CPUs use `cpu_attention.py`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from megatron_tiedlora.base.messages import first_line
from megatron_tiedlora.model.batch import Documents
from megatron_tiedlora.model.cpu_attention import Scores
from megatron_tiedlora.parallel.frozen_weight import HALF, padded

Attend = Callable[[Tensor, Tensor, Tensor, Documents, Scores], Tensor]
"""A function (query, key, value, documents, scores) that returns the attention output, shaped as query.

Queries are (tokens, heads, head_dim). Keys and values are (tokens, kv heads, head_dim)."""

Installed = Callable[[str], bool]
"""A function that returns whether the Python module of a library is installed."""

TILES = "tiles of queries"  # the name of `cpu_attention.attend_by_tiles`
_CAUSAL = 1  # the memory-efficient kernel's mask type: a query attends to keys up to its own position


@dataclass(frozen=True)
class AttentionRoute:
    """The kernel that computes attention on a device.

    Attributes:
        name: the name that is shown to the user.
        reason: the reason why no earlier candidate was chosen.
        attend: the function; None for `cpu_attention.attend_by_tiles`.
        otherwise: the name of the kernel for rows that the first one does not support; "" if it supports all.
    """

    name: str
    reason: str
    attend: Attend | None
    otherwise: str = ""

    def __str__(self) -> str:
        return f"{self.name}{self.otherwise and f', {self.otherwise} for other rows'} ({self.reason})"


@cache
def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    deterministic: bool = False,
    window: bool = False,
    cap: float | None = None,
) -> AttentionRoute:
    """Return the first candidate that runs on `device`, tested with a forward and backward pass on a few tokens.

    Args:
        deterministic: whether gradients must be bit-equal in every run. flash_attn gets this as an argument and is not
            chosen if it rejects the argument. cuDNN is not chosen. PyTorch's other kernels follow
            torch.use_deterministic_algorithms, which the caller sets.
        window, cap: whether some documents are longer than the window of the scores; their cap, see `Scores`.
    """
    if device.type == "cpu":
        return AttentionRoute(TILES, "a CPU", None)
    rejected: list[str] = []
    first: tuple[FusedKernel, Attend] | None = None  # a kernel that supports only some rows
    attend: Attend | None = None if window or cap is not None else one_by_one
    name = TILES if attend is None else "PyTorch's attention, one document after another"
    for candidate in CANDIDATES if device.type == "cuda" else ():
        capability = torch.cuda.get_device_capability(device)
        obstacle = candidate.obstacle(capability, dtype, head_dim, deterministic=deterministic, window=window, cap=cap)
        if obstacle is None:
            try:
                made = candidate.make(deterministic)
                _try(made, device, dtype, head_dim, candidate.multiple, Scores(1.0, 2 if window else None, cap))
            except torch.OutOfMemoryError:  # this is no fault of the kernel
                raise
            except Exception as error:  # a library built for another torch or GPU can raise anything
                obstacle = f"does not run here: {type(error).__name__}: {first_line(error)}"
            else:
                if candidate.multiple is None:
                    name, attend = candidate.name, made
                    break
                first = candidate, made
                continue
        rejected.append(f"{candidate.name} {obstacle}")
    none = "the first choice" if device.type == "cuda" else f"fused kernels are for CUDA, not for {device.type}"
    reason = "; ".join(rejected) or none
    if first is None or attend is None:
        return AttentionRoute(name, reason, attend)
    return AttentionRoute(first[0].name, reason, _by_lengths(*first, attend), otherwise=name)


def attend_within(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores, attend: Attend
) -> Tensor:
    """Return causal attention within each document.

    Args:
        query: (b, heads, s, head_dim); key and value: (b, kv heads, s, head_dim).
        attend: the function in an AttentionRoute.

    Returns:
        (b, s, heads * head_dim).
    """
    size, _, length, head_dim = query.shape
    missing = padded(head_dim) - head_dim  # kernels load 8 elements at a time

    def by_tokens(heads: Tensor) -> Tensor:
        rows = heads.transpose(1, 2).flatten(0, 1)
        return functional.pad(rows, (0, missing)) if missing else rows

    output = attend(by_tokens(query), by_tokens(key), by_tokens(value), documents, scores)
    return (output[..., :head_dim] if missing else output).reshape(size, length, -1)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
    """Compute PyTorch's attention for one document at a time, or for all at once if their lengths are equal."""
    grouped = query.shape[1] != key.shape[1]

    def within(length: int, *rows: Tensor) -> Tensor:
        query, key, value = (heads.unflatten(0, (-1, length)).transpose(1, 2) for heads in rows)
        output = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scores.scale, enable_gqa=grouped
        )
        return output.transpose(1, 2).flatten(0, 1)

    if _have_one_length(documents):
        return within(documents.longest, query, key, value)
    parts = (
        within(stop - start, query[start:stop], key[start:stop], value[start:stop])
        for start, stop in pairwise(documents.bounds)
    )
    return torch.cat(list(parts))


def _have_one_length(documents: Documents) -> bool:
    return (len(documents.bounds) - 1) * documents.longest == documents.bounds[-1]


def _by_lengths(kernel: "FusedKernel", whole: Attend, packed: Attend) -> Attend:
    """Return a function that uses `whole`, the function of `kernel`, for documents that it supports, else `packed`."""

    def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
        supported = _have_one_length(documents) and documents.longest % (kernel.multiple or 1) == 0
        return (whole if supported else packed)(query, key, value, documents, scores)

    return attend


@dataclass(frozen=True)
class FusedKernel:
    """A fused kernel, and the devices and dtypes that it supports.

    Attributes:
        kernel: a function of PyTorch, or the name of a library's Python module.
        min_capability: the lowest compute capability by dtype; other dtypes are not supported.
        below: the lowest compute capability that is too new; None if there is no such limit.
        max_head_dim: the largest head dim; None if there is no limit.
        install: the command that installs the library; "" if a compiler is needed, or for PyTorch's kernels.
        multiple: the kernel supports only documents of one length, which must be a multiple of this; None if it
            supports all documents.
        windows, caps: whether scores can have a window or a cap, see `Scores`.
    """

    name: str
    kernel: Attend | str
    min_capability: dict[torch.dtype, tuple[int, int]]
    below: tuple[int, int] | None = None
    max_head_dim: int | None = None
    install: str = ""
    multiple: int | None = None
    windows: bool = True
    caps: bool = False

    def make(self, deterministic: bool) -> Attend:
        """Return the kernel's function; see `choose_attention`."""
        return _from_library(self.kernel, deterministic) if isinstance(self.kernel, str) else self.kernel

    def obstacle(
        self,
        capability: tuple[int, int],
        dtype: torch.dtype,
        head_dim: int,
        *,
        here: Installed | None = None,
        deterministic: bool = False,
        window: bool = False,
        cap: float | None = None,
    ) -> str | None:
        """Return the reason why the kernel is not chosen, as words that follow its name, or None if it can run.

        Args:
            here: which libraries are installed; None for those of this computer.
            deterministic: see `choose_attention`. Whether a library's kernel can be deterministic shows when it runs.
            window, cap: see `choose_attention`.
        """
        if dtype not in self.min_capability:
            return f"has no {str(dtype).removeprefix('torch.')}"
        if capability < self.min_capability[dtype] or (self.below is not None and capability >= self.below):
            return f"is not for compute capability {capability[0]}.{capability[1]}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"has no heads of {head_dim}"
        if window and not self.windows:
            return "has no windows"
        if cap is not None and not self.caps:
            return "does not cap scores"
        if isinstance(self.kernel, str) and not (here or is_installed)(self.kernel):
            return "is not installed"
        if self.kernel is _torch_cudnn and here is None and (torch.backends.cudnn.version() or 0) < _CUDNN:
            return "needs cuDNN 9.15.1"
        if self.kernel is _torch_cudnn and deterministic:
            return "has gradients that differ from run to run"
        return None


def is_installed(module: str) -> bool:
    """Return whether a module with code is installed. A folder without code, which has no origin, does not count."""
    try:
        found = find_spec(module)
    except Exception:  # the package of a submodule is imported, and is missing or built for another torch
        return False
    return found is not None and found.origin is not None


def _from_library(module: str, deterministic: bool) -> Attend:
    """Return `flash_attn_varlen_func` of a library. FlashAttention 2 to 4 have the same names for these arguments."""
    function = importlib.import_module(module).flash_attn_varlen_func
    options: dict[str, object] = {"deterministic": True} if deterministic else {}

    def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
        window = {} if scores.window is None else {"window_size": (scores.window - 1, 0)}
        cap = {} if scores.cap is None else {"softcap": scores.cap}  # versions before 2.6 have no such argument
        result = function(
            query,
            key,
            value,
            cu_seqlens_q=documents.offsets,
            cu_seqlens_k=documents.offsets,
            max_seqlen_q=documents.longest,
            max_seqlen_k=documents.longest,
            softmax_scale=scores.scale,
            causal=True,
            **options | window | cap,
        )
        output: Tensor = result[0] if isinstance(result, tuple) else result  # early versions of 3 also return log sums
        return output

    return attend


def _torch_cudnn(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
    assert _have_one_length(documents), "documents of different lengths"
    rows = (heads.unflatten(0, (-1, documents.longest)).transpose(1, 2) for heads in (query, key, value))
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(*rows, None, True, 0.0, True, False, scale=scores.scale)
    output: Tensor = result[0].transpose(1, 2).flatten(0, 1)
    if output.requires_grad:  # PyTorch finds a plan by the strides of q, k and v alone, and not of the gradient
        output.register_hook(Tensor.contiguous)
    return output


def _torch_flash(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
    offsets, longest = documents.offsets, documents.longest
    options = {} if scores.window is None else {"window_size_left": scores.window - 1, "window_size_right": 0}
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, offsets, offsets, longest, longest, 0.0, True, False, scale=scores.scale, **options
    )[0]
    return output


def _torch_efficient(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scores: Scores) -> Tensor:
    offsets, longest = documents.offsets, documents.longest
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
    one_row = (heads[None] for heads in (query, key, value))
    output: Tensor = torch.ops.aten._efficient_attention_forward(
        *one_row, None, offsets, offsets, longest, longest, 0.0, _CAUSAL, True, scale=scores.scale
    )[0]
    return output.squeeze(0)


_CUDNN = 91501  # earlier versions read beyond rows whose length is no multiple of 128
_HOPPER, _AMPERE = dict.fromkeys(HALF, (9, 0)), dict.fromkeys(HALF, (8, 0))
_ALL = {torch.float32: (5, 0), torch.float16: (5, 0), torch.bfloat16: (8, 0)}
# FlashAttention 3 has wheels for CUDA 12.6 and 13.0.
_FA3 = "pip install flash-attn-3 --extra-index-url https://download.pytorch.org/whl/cu130"
CANDIDATES = (
    FusedKernel("FlashAttention 3", "flash_attn_interface", _HOPPER, (10, 0), 256, install=_FA3, caps=True),
    FusedKernel("FlashAttention 4", "flash_attn.cute", _HOPPER, (13, 0), 128, install="pip install flash-attn-4"),
    FusedKernel("PyTorch's cuDNN kernel", _torch_cudnn, _HOPPER, (11, 0), 128, multiple=128, windows=False),
    FusedKernel("flash_attn", "flash_attn", _AMPERE, max_head_dim=256, caps=True),
    FusedKernel("PyTorch's flash kernel", _torch_flash, _AMPERE, max_head_dim=256),
    FusedKernel("PyTorch's memory-efficient kernel", _torch_efficient, _ALL, windows=False),
)


def _try(
    attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int, multiple: int | None, scores: Scores
) -> None:
    """Run the forward and backward pass on two documents with grouped queries. Errors are not caught."""
    bounds = [0, 3, 8] if multiple is None else [0, multiple, 2 * multiple]
    documents = Documents(bounds, torch.tensor(bounds, dtype=torch.int32, device=device), bounds[2] - bounds[1])
    large = 0.0 if scores.cap is None else (4 * scores.cap / padded(head_dim)) ** 0.5  # scores are 4 times the cap
    with torch.enable_grad():
        query, key, value = (
            torch.full((bounds[2], num, padded(head_dim)), size, dtype=dtype, device=device, requires_grad=True)
            for num, size in ((2, large), (1, large), (1, 0.0))
        )
        gradients = torch.autograd.grad(attend(query, key, value, documents, scores).sum(), (query, key, value))
    if query.is_cuda:
        torch.cuda.synchronize(device)  # a kernel that does not support this GPU may fail late
    # Each query's probabilities sum to 1 in the backward pass, too. They are larger without the cap (flash_attn 2.6.0).
    if scores.cap is not None and not 0.9 < float(gradients[2].sum()) / query.numel() < 1.1:
        raise RuntimeError("its backward pass does not cap scores")
