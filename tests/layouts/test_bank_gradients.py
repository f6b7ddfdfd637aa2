"""Several adapters in shared micro-batches at layouts, in fp64: each has the dense oracle's gradients, and no message
more is sent than for one of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bank_worker import BankCase, BankOutcome, run_bank_cases
from engine_runs import relative_distance
from forked_ranks import run_on_ranks
from gradient_worker import DTYPE, joined_gradients
from oracle import OracleConfig, cast_weights, load_weights
from oracle_adapter import ALL_TARGETS
from oracle_training import oracle_gradients
from shared_batches import Member
from tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-10
A = Member("a", {"method": "tl6", "rank": 3}, ((1, 1), (1, 1)), seed=1)
FOUR = (
    A,
    Member("b", {"method": "lora", "rank": 2, "layers": (2, 4)}, ((1, 1, 1), (1,)), seed=2),
    Member("c", {"method": "tl2", "rank": 8, "targets": ALL_TARGETS}, ((1,), (1, 1)), seed=3),
    Member("d", {"method": "tl4", "rank": 1, "layers": (4, 5), "targets": ("o_proj", "gate_up")}, ((1, 1, 1),), seed=4),
)
TWO = (FOUR[1], Member("e", {"method": "tl5", "rank": 4, "layers": (5,), "targets": ("down_proj",)}, ((1, 1),), seed=5))
PACKED = tuple(
    Member(m.name, m.adapter, rows, seed=m.seed, packed=True)
    for m, rows in zip(FOUR, (((3, 2),), ((4,), (2,)), ((1, 1),), ((2, 2),)), strict=True)
)
LAYOUTS = {2: ((2, 1, 1), (1, 2, 1), (1, 1, 2)), 4: ((2, 2, 1), (1, 2, 2), (2, 1, 2))}


def _cases(folder: Path, ranks: int, family: str) -> list[BankCase]:
    cases = []
    if family == "olmo2":  # norms after the linears, and of all heads
        return [BankCase(folder, (2, 2, 1), PACKED, cut, recompute="selective") for cut in (True, False)]
    for layout in LAYOUTS[ranks]:
        for sequence in (True, False) if layout[0] > 1 else (False,):
            cases += [
                BankCase(folder, layout, FOUR, sequence),
                BankCase(folder, layout, FOUR, sequence, shared=False),
                BankCase(folder, layout, TWO, sequence, recompute="full"),
                BankCase(folder, layout, PACKED, sequence, recompute="selective"),
            ]
    return cases


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path, shape = tmp_path_factory.mktemp("models"), {"num_layers": 5, "head_dim": 6, "vocab_size": 321}
    families = ("llama", "olmo2")
    return {name: write_tiny_model(path / name, tokenizer=False, family=name, **shape) for name in families}


@pytest.mark.parametrize(("ranks", "family"), [(2, "llama"), (4, "llama"), (4, "olmo2")])
def test_each_adapter_has_the_oracles_gradients(
    folders: dict[str, Path], tmp_path: Path, ranks: int, family: str
) -> None:
    folder = folders[family]
    cases = _cases(folder, ranks, family)
    weights, config = cast_weights(load_weights(folder), DTYPE), OracleConfig.from_folder(folder)
    answers: dict[tuple[str, bool], tuple[float, dict[str, torch.Tensor]]] = {}
    by_rank = run_on_ranks(run_bank_cases, cases, ranks=ranks, folder=tmp_path)
    for case, outcomes in zip(cases, zip(*by_rank, strict=True), strict=True):
        for member in case.members:
            key = member.name, member.packed
            if key not in answers:
                answers[key] = oracle_gradients(weights, config, case.of(member).adapter, member.samples)
            check(case, member, list(outcomes), *answers[key])
        check_sums(case, list(outcomes))


def check(
    case: BankCase, member: Member, outcomes: list[BankOutcome], loss: float, expected: dict[str, torch.Tensor]
) -> None:
    """The loss and all gradients of one adapter are the oracle's."""
    found_loss = sum(outcome.losses[member.name] for outcome in outcomes) / case.layout[0]
    assert abs(found_loss - loss) <= TOLERANCE * abs(loss), (found_loss, loss, member, case)
    own = [BankOutcome(o.losses, o.gradients[member.name], o.traffic, o.sum_traffic) for o in outcomes]
    gradients = joined_gradients(case.of(member), own)  # type: ignore[arg-type]
    assert gradients.keys() == expected.keys()
    for name, reference in expected.items():
        assert reference.abs().max() > 0, (name, member)
        assert relative_distance(gradients[name], reference) <= TOLERANCE, (name, member, case)


def check_sums(case: BankCase, outcomes: list[BankOutcome]) -> None:
    """Each group of several ranks has one message with the gradients of all adapters."""
    tp, pp, dp = case.layout
    most = (tp * dp > 1) + (pp * dp > 1) + (dp > 1)  # of u, of tied tensors, and of the others
    for outcome in outcomes:
        messages = outcome.sum_traffic.messages
        assert {kind for _, kind in messages} <= {"all-reduce"}, messages
        assert sum(messages.values()) == most or (case.members == TWO and sum(messages.values()) < most), case


@pytest.mark.parametrize("layout", [(2, 1, 1), (2, 2, 1)])
def test_four_adapters_send_no_more_messages_than_one(
    folders: dict[str, Path], tmp_path: Path, layout: tuple[int, int, int]
) -> None:
    """The columns beside hidden states are those of the widest rank; how many messages there are is the same."""
    both, folder = (FOUR, (A,)), folders["llama"]
    cases = [BankCase(folder, layout, members, sequence) for sequence in (True, False) for members in both]
    for outcomes in run_on_ranks(run_bank_cases, cases, ranks=layout[0] * layout[1], folder=tmp_path):
        for four, one in (outcomes[:2], outcomes[2:]):
            assert four.traffic.messages == one.traffic.messages
            assert four.sum_traffic.messages == one.sum_traffic.messages and one.traffic.messages
