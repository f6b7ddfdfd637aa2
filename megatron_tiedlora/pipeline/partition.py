"""Where to cut the flat list into stages: the contiguous partition whose most expensive stage costs least.

Costs are multiplications per token, forward and backward. A frozen base has no weight gradients, so a layer's backward
pass costs as much as its forward pass (attention's twice that), and nothing below the first adapted layer has one.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tiedlora.model.families.llama import LlamaConfig

Stages = tuple[range, ...]


def layer_costs(config: LlamaConfig, *, length: int, first_adapted: int) -> list[float]:
    """Multiplications per token of every layer of the flat list (embedding, blocks, head), each pass.

    Block: P = d (h + 2k) + h d + 3 d f for the products (h, k: widths of queries and keys), A = s h for causal
    attention over s tokens; forward P + A, and backward P + 2A from the first adapted layer (`first_adapted`, 1-based)
    on. Head: V d each way, as if every position were supervised. The embedding is a copy.
    """
    query, key, value = config.qkv_rows
    d = config.hidden_size
    products = d * (query + key + value) + query * d + 3 * d * config.intermediate_size
    attention = length * query
    costs = [0.0]
    for index in range(1, config.num_layers + 1):
        backward = products + 2 * attention if index >= first_adapted else 0.0
        costs.append(float(products + attention + backward))
    costs.append(2.0 * config.vocab_size * d)
    return costs


def partition(costs: Sequence[float], num_stages: int) -> Stages:
    """Cut layers 0 to len(costs) - 1 into `num_stages` runs, each with a block (so neither embedding nor head alone).

    The largest cost of a stage is least; among such cuts the sum of squares is, which evens out the rest.

    Raises:
        ValueError: fewer blocks than stages.
    """
    num_layers, num_blocks = len(costs), len(costs) - 2
    if num_stages > num_blocks:
        raise ValueError(f"{num_blocks} layers cannot be cut into {num_stages} stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[stop]: (largest, squares, cuts) of layers 0 to stop - 1 in the stages so far; a cut lies after a block.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(num_stages):
        left = num_stages - stage - 1
        stops = [num_layers] if left == 0 else range(stage + 2, num_blocks - left + 2)
        following = {}
        for stop in stops:
            choices = []
            for start, (largest, squares, cuts) in best.items():
                if stop - start < (2 if start == 0 or stop == num_layers else 1):
                    continue
                cost = total[stop] - total[start]
                choices.append((max(largest, cost), squares + cost * cost, (*cuts, stop)))
            if choices:
                following[stop] = min(choices)
        best = following
    cuts = best[num_layers][2]
    return tuple(range(start, stop) for start, stop in zip((0, *cuts), cuts, strict=False))
