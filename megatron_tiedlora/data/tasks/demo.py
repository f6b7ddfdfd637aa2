"""The demo: generated grade-school maths in GSM8K's form, so that nothing has to be downloaded."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tiedlora.data.readers import Row
from megatron_tiedlora.data.task import Split, Task
from megatron_tiedlora.data.tasks import gsm8k


def _rows(split: Split) -> Iterator[Row]:
    from megatron_tiedlora.data.demo import demo_examples  # only the demo needs reasoning-gym

    for number, row in enumerate(demo_examples(split), start=1):
        yield row, f"demo {split}: row {number}"


TASK = Task(
    name="demo",
    fields=gsm8k.TASK.fields,
    template=gsm8k.TASK.template,
    parts=gsm8k.question_parts,
    metrics=gsm8k.TASK.metrics,
    stop=gsm8k.TASK.stop,
    generate=_rows,
    scored_rows=24,  # enough to see a change, few enough for two CPU cores
    max_new_tokens=200,  # 99 % of its worked answers are shorter
    micro_batch_rows=4,
    exports_merged=True,
    fp32_on_slow_cpus=True,  # with bf16 the run would take hours there
)
