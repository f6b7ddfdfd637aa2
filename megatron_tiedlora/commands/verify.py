"""Check exports of an adapter: the bits of a merged or PEFT folder, and logits; exit status 1 if any differ."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.config.cli import CommandParser, path_value

EXAMPLE = """\
example:
  tiedlora verify --adapter runs/demo/adapter --merged runs/demo/merged --peft runs/demo/peft

Every tensor of the merged files is compared bit by bit: with base + adapter, added in fp32 and cast once, or with the
base. A PEFT folder that this package exported is compared bit by bit with the adapter's export; one of another program
by its logits alone. Then logits are computed one layer at a time, which needs the memory of one layer. transformers and
PEFT load the exports too, if the model has at most 8 GB in fp32: they need memory for all of it.

Columns: largest and mean difference as a share of the largest logit, KL divergence in nats per position, and how often
the most likely token is the same, over random tokens.
"""


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="tiedlora verify", description=__doc__, epilog=EXAMPLE)
    described.add_adapter("a run's adapter/ folder or one of its checkpoints, or a PEFT LoRA or VeRA")
    described.add_argument("--merged", type=path_value, metavar="DIR", help="output of tiedlora merge")
    described.add_argument("--peft", type=path_value, metavar="DIR", help="output of tiedlora export")
    described.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the logits' computation by layers [fp32]"
    )
    described.add_argument(
        "--in",
        dest="inside",
        metavar="NAMES",
        help="what loads the exports too: transformers, peft, transformers,peft or none [both, up to 8 GB in fp32]",
    )
    described.add_argument(
        "--base_differs", action="store_true", help="compare even if the base differs from the one in training"
    )
    return described


def main(argv: Sequence[str]) -> int:
    """Check the exports; returns the exit status."""
    options = parser().parse_known_names(argv)
    if options.merged is None and options.peft is None:
        raise UserError("there is nothing to check; give --merged DIR, --peft DIR or both")
    # These import torch and transformers, which takes seconds: --help and a wrong flag do not wait for it.
    from megatron_tiedlora.checkpoint.load_model import DTYPES
    from megatron_tiedlora.convert.inputs import check_base
    from megatron_tiedlora.convert.open_adapter import open_adapter
    from megatron_tiedlora.convert.verify import verify_export

    opened = open_adapter(options.adapter, options.model, differs=options.base_differs)
    base = check_base(opened.source, opened.adapter, uses_tokenizer=False, differs=options.base_differs)
    for note in (*opened.notes, *base.notes):
        show(f"note: {note}")
    found = verify_export(
        opened.source,
        opened.adapter,
        merged=options.merged,
        peft=options.peft,
        dtype=DTYPES[options.dtype],
        inside=options.inside,
        progress=True,
    )
    print(found.report())
    return 0 if found.passed else 1
