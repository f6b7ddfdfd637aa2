"""Cut XQuAD's English part (nested SQuAD JSON) into train, validation and test rows by article, for docs/study.md.

    python docs/study/split_xquad.py xquad.en.json OUTPUT_DIR

No article is in two parts. Paragraphs of over 120 words are left out, so that the study fits two CPU cores.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 1234
MAX_WORDS = 120
VALIDATION_ROWS, TEST_ROWS = 48, 192  # at least; articles are whole


def main(source: str, target: str) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl, and print how many rows each has."""
    articles = json.loads(Path(source).read_text(encoding="utf-8"))["data"]
    random.Random(SEED).shuffle(articles)
    parts: dict[str, list[dict[str, object]]] = {"test": [], "validation": [], "train": []}
    for article in articles:
        rows = [
            {"context": paragraph["context"], "question": qa["question"], "answers": qa["answers"]}
            for paragraph in article["paragraphs"]
            if len(paragraph["context"].split()) <= MAX_WORDS
            for qa in paragraph["qas"]
        ]
        wanted = {"test": TEST_ROWS, "validation": VALIDATION_ROWS}
        part = next((name for name, number in wanted.items() if len(parts[name]) < number), "train")
        parts[part] += rows
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
