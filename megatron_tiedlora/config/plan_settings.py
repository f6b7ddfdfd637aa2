"""Settings of tiedlora plan: the cluster, and what is shown. All other flags on its command line are tiedlora train's.

A training flag that chooses a layout limits the search to that value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import BASE_NAMES, UNQUANTISED
from megatron_tiedlora.config.cli import parse_settings, split_words
from megatron_tiedlora.config.fields import (
    CommandSettings,
    decided_by,
    setting_field,
    shared_field,
    validate_settings,
)
from megatron_tiedlora.config.other_names import OTHER_FORMATS
from megatron_tiedlora.config.settings import Settings

ABOUT = """\
Find the fastest parallel configuration of a cluster before it is booked: what fits, what it sends, how long it takes.

    tiedlora plan --model llama2-70b --nodes 4 --gpus_per_node 8 --gpu h100            a table, the fastest first
    tiedlora plan --model FOLDER --train_file data.jsonl --gpu a100-80                 with the lengths of your samples
    tiedlora plan --model FOLDER --adapters four.yaml                                  several adapters in one run
    tiedlora plan ... --why t2p1d16-b2-zero0                                           the arithmetic of one row
    tiedlora plan ... --yaml plan.yaml                                                 settings of the fastest row

It needs no GPU and reads no weights. Every combination of tensor, pipeline and sequence parallelism, micro-batch,
recompute, ZeRO stage and storage format that tiedlora train accepts is enumerated, by the same checks. Stages, memory,
messages and FLOPs are those of --dry_run; a few constants of the cards make seconds of them (--constants FILE).
With --adapters all layouts are of one run of several adapters, which is compared with one adapter after another."""

# Where a flag of tiedlora train has another default here; --max_length at most the model's limit, as there.
PLAN_DEFAULTS = {"max_length": 4096, "global_batch_size": 128}
FORMAT_NAMES = (UNQUANTISED, *BASE_NAMES, "fp8-products", "fp8-transposed")


class PlanSettings(CommandSettings, command="plan"):
    """The cluster of a plan and what is shown of it, validated and frozen."""

    about: ClassVar[str] = ABOUT
    usage: ClassVar[str] = "--model M [--FLAG VALUE ...]"
    examples: ClassVar[str] = "Settings of tiedlora train follow. The YAML file of --config holds only those."
    groups: ClassVar[dict[str, str]] = {
        "run": "every flag of tiedlora train: --model, --method, --train_file ...; those of a layout limit the search",
        "cluster": "what is booked",
        "shown": "what is shown and written",
    }

    nodes: int = setting_field("cluster", "number of nodes", 1, ge=1, le=4096)
    gpus_per_node: int = setting_field("cluster", "cards in a node", 8, ge=1, le=256)
    gpu: str | None = shared_field(Settings, "gpu", "the kind of card [h100]", group="cluster")
    ranks_on_cpu: int | None = setting_field(
        "cluster", "plan so many ranks on this machine's CPUs", None, ge=1, le=1024,
    )
    constants: str | None = setting_field(
        "cluster", "constants of a machine, a file of --measure, in place of --gpu", None,
    )
    measure: str | None = setting_field(
        "cluster", "measure the constants of this machine, write them to this file (-: print them), and plan nothing",
        None,
    )
    measure_seconds: float = setting_field("cluster", "about how long --measure takes", 60.0, gt=0, le=3600)
    formats: tuple[str, ...] | None = setting_field(
        "cluster",
        "storage formats of the base to choose from [16 bits or that of --base; what others would gain is said]", None,
        choices=FORMAT_NAMES, other_values=OTHER_FORMATS,
    )

    top: int = setting_field("shown", "rows of the table; 0 for all", 20, ge=0)
    every_layout: bool = setting_field(
        "shown", "show each layout, not only the fastest of each tensor x pipeline x data and storage format", False,
    )
    why: str | None = setting_field("shown", "print the arithmetic of this layout, a name of the table", None)
    layout: str | None = setting_field("shown", "write command and YAML of this layout [the fastest that fits]", None)
    yaml: str | None = setting_field("shown", "write the settings of the layout to this file, for --config", None)
    json_file: str | None = setting_field(
        "shown", "write all layouts to this file; - prints them instead of the table", None, flag="json",
    )

    def check(self) -> None:
        """Raise ValueError for settings that do not fit each other."""
        given = self.model_fields_set
        if self.formats == ():
            raise ValueError(f"--formats is empty; give some of {', '.join(FORMAT_NAMES)}")
        for name in ("measure", "constants", "json_file", "yaml"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"--{name.removesuffix('_file')}: the path is empty")
        for flag in ("nodes", "gpus_per_node", "gpu"):
            if self.ranks_on_cpu is not None and flag in given:
                raise ValueError(f"--ranks_on_cpu {self.ranks_on_cpu} plans this machine's CPUs; remove --{flag}")
        if self.constants is not None and self.gpu is not None:
            raise ValueError(f"--constants {self.constants} and --gpu {self.gpu} both say what a card does; give one")
        if self.measure is None and "measure_seconds" in given:
            raise ValueError("--measure_seconds needs --measure")


@dataclass(frozen=True)
class PlanCommand:
    """One start of tiedlora plan: its own settings, and those of the run that is planned."""

    settings: PlanSettings
    train: Settings


def parse_plan(argv: Sequence[str]) -> PlanCommand:
    """Parse the settings of both.

    Raises:
        UserError: something is unknown, out of range or contradictory, in the words of tiedlora train.
    """
    own, known, words = split_words(argv, PlanSettings)
    others = [name for name in known if name not in ("model", "config")]
    others += sorted(name.removesuffix("_file") for name in own.keys() - {"measure", "measure_seconds"})
    if "measure" in own and others:  # of a run only the model is read
        raise UserError(f"--measure measures this machine and plans nothing; remove --{others[0]}")
    # As a dry run, which needs no data. That a file of --config says so, too, does no harm.
    train = parse_settings([*words, "--dry_run"], Settings)
    for name, instead in decided_by("plan", Settings).items():
        if name in known or name in train.model_fields_set - {"dry_run"}:
            raise UserError(f"--{name} is not for a plan: {instead}")
    defaults = {name: value for name, value in PLAN_DEFAULTS.items() if name not in train.model_fields_set}
    return PlanCommand(validate_settings(own, PlanSettings), train.completed(**defaults))
