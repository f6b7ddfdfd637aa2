"""Compare the logits of base + adapter with those of its exports, in fp32; exit status 1 if one differs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.config.cli import CommandParser, path_value, run_command

EXAMPLE = """\
example:
  python tools/verify_export.py --adapter runs/demo/adapter --merged runs/demo/merged --peft runs/demo/peft

Columns: largest and mean difference as a share of the largest logit, KL divergence in nats per position, and how often
the most likely token is the same, over random tokens. It needs the memory of the model in fp32.
"""


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="verify_export.py", description=__doc__, epilog=EXAMPLE)
    described.add_adapter()
    described.add_argument("--merged", type=path_value, metavar="DIR", help="output of tools/merge_adapter.py")
    described.add_argument("--peft", type=path_value, metavar="DIR", help="output of tools/export_peft.py")
    described.add_argument(
        "--base_differs", action="store_true", help="compare even if the base differs from the one in training"
    )
    return described


def main(argv: Sequence[str]) -> int:
    """Compare the exports; returns the exit status."""
    options = parser().parse_known_names(argv)
    # These import torch and transformers, which takes seconds: --help and a wrong flag do not wait for it.
    from megatron_tiedlora.convert.inputs import check_base, open_inputs
    from megatron_tiedlora.convert.verify import format_comparisons, verify_export

    source, adapter = open_inputs(options.adapter, options.model)
    base = check_base(source, adapter, uses_tokenizer=False, differs=options.base_differs)
    for note in base.notes:
        show(f"note: {note}")
    results = verify_export(source, adapter, merged=options.merged, peft=options.peft, progress=True)
    print(format_comparisons(results))
    return 0 if all(row.passed for row in results) else 1


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
