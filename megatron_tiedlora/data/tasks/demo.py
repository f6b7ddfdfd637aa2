"""Defines the demo task: grade-school maths like GSM8K. The package reasoning-gym generates the rows.

A row is used only if its worked answer is a valid target. The answer must end with `#### N`, where N >= 0 equals the
field `answer`. No number in the question or the worked answer may have rounding errors.
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.data.tables import numbered_rows
from megatron_tiedlora.data.task import Split, Task
from megatron_tiedlora.data.tasks import gsm8k

SIZES = {"train": 2400, "validation": 48, "test": 48}

# The splits have separate ranges of row indices, because reasoning-gym generates row i with Random(i).
_BLOCKS = {"test": range(0, 1000), "validation": range(1000, 2000), "train": range(2000, 102_000)}

_PACKAGE = "reasoning_gym"
_MODULE = "reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic"
_FINAL_ANSWER = re.compile(r"\n#### (\d[\d,]*(?:\.\d+)?)$")
_FLOAT_DEBRIS = re.compile(r"\d\.\d{4,}")


def usable(row: dict[str, Any]) -> bool:
    """Return whether a raw reasoning-gym row can be a training target.

    6 % of 60,000 rows are rejected. In these rows the worked answer ends with `#### 8.0` although the answer is `8`, an
    age is negative, or a number has rounding errors, such as `26.250000000000004 hours`.
    """
    worked = row["metadata"]["answer_cot"]
    final = _FINAL_ANSWER.search(worked)
    if final is None or final.group(1) != row["answer"] or worked.count("####") != 1:
        return False
    return not _FLOAT_DEBRIS.search(row["question"] + worked)


def demo_examples(split: Split) -> list[dict[str, str]]:
    """Return the rows `{"question", "answer"}` of one split. `answer` is the worked solution, which ends with `#### N`.

    The rows depend only on the split and on the installed version of reasoning-gym. All questions are different, within
    a split and between splits. So validation excludes all questions of the test block, and train excludes those of both
    blocks. All splits use the same templates, so held-out rows are known problems with new numbers and names.

    Raises UserError if reasoning-gym is missing, or if its installed version generates too few usable rows.
    """
    rows = list(islice(_fresh_rows(split), SIZES[split]))
    if len(rows) < SIZES[split]:
        raise UserError(f"reasoning-gym makes only {len(rows)} of {SIZES[split]} rows for {split}; use another version")
    return rows


def _fresh_rows(split: Split) -> Iterator[dict[str, str]]:
    """Yield the usable rows of a split whose questions occur neither in an earlier block nor in an earlier row."""
    dataset, seen = _dataset(), set[str]()
    for part, block in _BLOCKS.items():
        for row in (dataset[index] for index in block):
            question = row["question"].strip()
            if part == split and question not in seen and usable(row):
                seen.add(question)
                yield {"question": question, "answer": row["metadata"]["answer_cot"].strip()}
            elif part != split:
                seen.add(question)
        if part == split:
            return


def _dataset() -> Any:
    """Return reasoning-gym's data set `gsm_symbolic`, which has a row for each index in `_BLOCKS`."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        said = "the demo task needs the package reasoning-gym"
        raise UserError(f"{said}; install it with: pip install 'megatron_tiedlora[demo]'")
    if _PACKAGE not in sys.modules:
        with suppress(ImportError), _empty_parents(spec.submodule_search_locations or ()):
            return _built()
    return _built()  # other versions may have different modules and need the whole package


def _built() -> Any:
    module = importlib.import_module(_MODULE)
    dataset = module.GSMSymbolicDataset(module.GSMSymbolicDatasetConfig(seed=0, size=_BLOCKS["train"].stop))
    _ = dataset.generators  # imports the templates now, while their parent modules are in place
    return dataset


@contextmanager
def _empty_parents(roots: Sequence[str]) -> Iterator[None]:
    """Allow the `with` block to import only the modules of this data set, and remove them afterwards.

    reasoning-gym's `__init__` imports all of its hundred data sets, which takes a second and needs pycosat. pycosat has
    no wheel, so the import fails if no C compiler could build it. With empty parent modules that have the right
    `__path__`, submodules can be imported without `__init__`. They are removed afterwards, so that a later `import
    reasoning_gym` imports the real package. This function can be removed when pycosat has a wheel.
    """
    try:
        for name in (_PACKAGE, f"{_PACKAGE}.arithmetic", f"{_PACKAGE}.coaching"):
            parent = ModuleType(name)
            parent.__path__ = [str(Path(root, *name.split(".")[1:])) for root in roots]
            sys.modules[name] = parent
        yield
    finally:
        for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(_PACKAGE + ".")]:
            del sys.modules[name]


TASK = Task(
    name="demo",
    fields=gsm8k.TASK.fields,
    template=gsm8k.TASK.template,
    parts=gsm8k.question_parts,
    metrics=gsm8k.TASK.metrics,
    stop=gsm8k.TASK.stop,
    generate=lambda split: numbered_rows(demo_examples(split), f"demo {split}"),
    scored_rows=24,  # enough to see a change, few enough for two CPU cores
    max_new_tokens=200,  # 99 % of its worked answers are shorter
    micro_batch_rows=4,
    exports_merged=True,
    fp32_on_slow_cpus=True,  # with bf16 the run would take hours there
)
