"""HellaSwag's texts are those of lm-evaluation-harness, whose two functions stand here as they are there."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from task_files import HUB_ROWS, refusal, write_rows

from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Example, Reading
from megatron_tiedlora.evaluation.metrics import METRICS, Answer


def read_one(task: str, folder: Path, row: dict[str, Any], **options: Any) -> Example:
    path = write_rows(folder / "rows.jsonl", [row])
    (sample,) = load_split(task, "test", files={"test": path}, seed=0, **options)
    return sample


def test_hellaswag_is_cleaned_as_its_public_definition_says(tmp_path: Path) -> None:
    row = {
        "activity_label": "Health",
        "ctx_a": "[header] How to sleep [title] Go to bed early. [step] Do it  every day.",
        "ctx_b": "",
        "endings": ["[substeps] Wash it. [title] Dry it.", "Rest [a [b] c]", " two  spaces ", "[step]"],
        "label": 0,
    }
    sample = read_one("hellaswag", tmp_path, row)
    assert sample.prompt == "Health: How to sleep. Go to bed early. Do it every day."
    assert sample.choices == (" Wash it.. Dry it.", "Rest c]", "two spaces", "[step]")
    assert sample.endings == ("  Wash it.. Dry it.", " Rest c]", " two spaces", " [step]")
    assert (sample.completion, sample.references) == ("  Wash it.. Dry it.", ("Wash it.. Dry it.",))
    capitals = {**row, "ctx_a": "On a roof.", "ctx_b": "the MAN [x] sits", "label": "2"}
    assert read_one("hellaswag", tmp_path, capitals).prompt == "Health: On a roof. The man sits"
    assert read_one("hellaswag", tmp_path, capitals).references == ("two spaces",)
    assert read_one("hellaswag", tmp_path, {**row, "ctx_a": "On a roof. [step]"}).prompt == "Health: On a roof."


def test_a_template_can_show_hellaswag_s_endings(tmp_path: Path) -> None:
    row = HUB_ROWS["hellaswag"]
    shows = Reading(template=r"{split_type}: {context}\n{endings}\nRight:")
    sample = read_one("hellaswag", tmp_path, row, reading=shows)
    assert sample.prompt == (
        "indomain: Roof shingle removal: A man is sitting on a roof. He\n"
        "1. is ripping level tiles off.\n2. is holding a cube.\n3. sleeps.\n4. starts pulling up roofing.\nRight:"
    )
    assert sample.completion == " starts pulling up roofing."
    message = refusal(lambda: read_one("hellaswag", tmp_path, row, reading=Reading(template="{label}")))
    assert "no field 'label'" in message
    assert "activity_label, context, ctx, ctx_a, ctx_b, endings, ind, source_id, split, split_type" in message


def preprocess(text: str) -> str:
    text = text.strip()
    # NOTE: Brackets are artifacts of the WikiHow dataset portion of HellaSwag.
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    text = text.replace("  ", " ")
    return text


def process_doc(doc: dict[str, Any]) -> dict[str, Any]:
    ctx = doc["ctx_a"] + " " + doc["ctx_b"].capitalize()
    return {
        "query": preprocess(doc["activity_label"] + ": " + ctx),
        "choices": [preprocess(ending) for ending in doc["endings"]],
        "gold": int(doc["label"]),
    }


def test_prompts_and_endings_are_the_harness_s(tmp_path: Path) -> None:
    """Context and continuation as `loglikelihood` gets them: a space between, and the context's last ones moved."""
    draw = random.Random(3)
    parts = ["Wash it.", " [title]", " [step]", "[substeps] ", "Dry  it. ", "[header] How to", " a [b]", "  Go on."]

    def text() -> str:
        return "x" + "".join(draw.choices(parts, k=draw.randint(1, 5)))

    rows = [
        {"activity_label": "Health", "ctx_a": text(), "ctx_b": draw.choice(["", "the MAN", "[step]"]),
         "endings": [text()[draw.randint(0, 1) :] for _ in range(4)], "label": draw.randint(0, 3)}
        for _ in range(1000)
    ]  # fmt: skip
    files = {"test": write_rows(tmp_path / "rows.jsonl", rows)}
    for row, sample in zip(rows, load_split("hellaswag", "test", files=files, seed=0), strict=True):
        theirs = process_doc(row)
        moved = len(theirs["query"]) - len(theirs["query"].rstrip())
        expected = [theirs["query"][len(theirs["query"]) - moved :] + " " + choice for choice in theirs["choices"]]
        assert sample.prompt == theirs["query"].rstrip()
        for mine, ending, choice in zip(sample.endings, expected, theirs["choices"], strict=True):
            assert mine == ending or not choice.strip()  # of an ending of only brackets nothing would be left
        assert sample.completion == sample.endings[theirs["gold"]]
        scores = tuple(-float(draw.randint(1, 90)) for _ in range(4))
        ours = METRICS["accuracy_loglikelihood"].sample(Answer("", sample, scores))
        per_character = [score / len(choice) for score, choice in zip(scores, sample.choices, strict=True)]
        assert ours == 100.0 * (sample.choices[per_character.index(max(per_character))].strip() == sample.references[0])
