"""Means over seeds with spreads, intervals and paired differences, against numpy written apart; and their tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.run_files import edit_json
from support.sweep_runs import table2_markdown, table3_markdown, write_answers, write_scored, write_study
from support.task_files import refusal

from megatron_tiedlora.study import tables
from megatron_tiedlora.study.figures import lines as figure_lines
from megatron_tiedlora.study.record import Point, read_study
from megatron_tiedlora.study.tables import table2, table3

T = {2: 12.706, 3: 4.303}  # Student's t of a 95 % interval, by number of seeds
SUFFIXES = ("", "-seed1235", "-seed1236")


def drawn_rows(num: int) -> Any:
    """The rows of 1,000 resamples, (1000, num)."""
    return np.random.default_rng(0).integers(num, size=(1000, num))


def expected(values: Any, resampled: Any) -> tuple[float, float, float, float | None]:
    """Mean, low, high and spread from the values of the seeds, (N,), and of their resamples, (N, 1000)."""
    num, mean = len(values), float(np.mean(values))
    low, high = np.percentile(resampled.mean(0), [2.5, 97.5])
    if num == 1:
        return mean, low, high, None
    spread = float(np.std(values, ddof=1))
    half = T[num] * spread / num**0.5
    return mean, mean - ((mean - low) ** 2 + half**2) ** 0.5, mean + ((high - mean) ** 2 + half**2) ** 0.5, spread


def random_study(folder: Path, num_seeds: int, *, points: dict[str, tuple[float, float]], rows: int = 150) -> Any:
    """A study whose rows have scores of 0 to 100, with the mean and seed effect in `points`, and these scores, (seeds,
    rows), by the name of the first seed's run."""
    study = write_study(folder, seeds=num_seeds, single_layers=[1, 2], single_layer_rank=4)
    draw, scores = np.random.default_rng(7), {}
    for name, (mean, effect) in points.items():
        centres = mean + effect * draw.standard_normal((num_seeds, 1))
        scores[name] = np.clip(centres + 15 * draw.standard_normal((num_seeds, rows)), 0, 100)
        for suffix, values in zip(SUFFIXES, scores[name], strict=False):
            write_answers(study, name + suffix, [{"score": value} for value in values], float(np.mean(values)))
    return study, scores


def numbers(record: Any, *names: str) -> list[Any]:
    return [record[name] for name in names]


POINTS = {"lora-r2-lr1e-4": (50.0, 3.0), "lora-r8-lr1e-4": (60.0, 1.0), "tl6-r2-lr1e-4": (48.0, 2.0)}
POINTS |= {"tl6-r8-lr1e-4": (62.0, 2.0)}


@pytest.mark.parametrize("num_seeds", [1, 2, 3])
def test_scores_and_differences_equal_numpys(tmp_path: Path, num_seeds: int) -> None:
    study, scores = random_study(tmp_path / "study", num_seeds, points=POINTS)
    drawn = drawn_rows(150)
    resampled = {name: values[:, drawn].mean(-1) for name, values in scores.items()}
    checked = 0
    for record in table2([read_study(study)]):
        name = f"{record['method']}-r{record['rank']}-lr1e-4"
        mean, low, high, spread = expected(scores[name].mean(1), resampled[name])
        interval = [mean - 1, mean + 1] if num_seeds == 1 else [low, high]  # as results.json has it
        assert numbers(record, "score", "low", "high") == pytest.approx([mean, *interval], rel=1e-10)
        assert record["seeds"] == num_seeds and record["samples"] == 150
        assert record["spread"] == (spread if spread is None else pytest.approx(spread, rel=1e-10))
        # To LoRA's best rank, 8, in the paper's sections, and to the same rank in the section of all ranks.
        other = f"lora-r{record['rank'] if record['section'] == 'every_rank' else 8}-lr1e-4"
        if other == name:
            assert "difference" not in record
            continue
        want = expected((scores[name] - scores[other]).mean(1), resampled[name] - resampled[other])
        found = numbers(record, "difference", "difference_low", "difference_high")
        assert found == pytest.approx(list(want[:3]), rel=1e-9), record["section"]
        checked += 1
    assert checked == 4  # tl6 at LoRA's rank, at its own, and at both


def test_seeds_without_a_partner_are_left_out_of_a_difference_and_marked(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", seeds=3)
    for suffix, value in zip(SUFFIXES, (40.0, 50.0, 60.0), strict=True):
        write_answers(study, f"lora-r2-lr1e-4{suffix}", [{"score": value}] * 4, value)
    for suffix, value in zip(SUFFIXES[1:], (50.0, 62.0), strict=True):
        write_answers(study, f"tl6-r2-lr1e-4{suffix}", [{"score": value}] * 4, value)
    found = {record["method"]: record for record in table2([read_study(study)])}
    assert numbers(found["tl6"], "score", "seeds", "difference") == [56.0, 2, 1.0]
    assert found["lora"]["spread"] == pytest.approx(10)
    half = T[3] * 10 / 3**0.5
    text = table2_markdown([read_study(study)])
    assert f"| 50.00 ± 10.00 | {50 - half:.2f} to {50 + half:.2f} | 2 |" in text
    # Scores stay within 0 to 100, and differences within -100 to 100.
    assert "| 56.00 ± 8.49* | 0.00 to 100.00 | 2 |" in text and "not all learning rates and seeds are finished" in text
    assert f"| 1.00 ({1 - T[2]:.2f} to {1 + T[2]:.2f}) |" in text  # of 0 and 2, whose spread is the root of 2


def test_bleu_is_computed_again_from_resampled_rows(tmp_path: Path) -> None:
    """The oracle is sacrebleu's corpus_score of each resample's rows."""
    from sacrebleu.metrics import BLEU

    study, draw = write_study(tmp_path / "study", task="iwslt2017"), np.random.default_rng(3)
    references, texts = [" ".join(draw.choice(list("abcdefgh"), 12)) for _ in range(20)], {}
    for name, rate in (("lora-r2-lr1e-4", 0.1), ("tl6-r2-lr1e-4", 0.3)):
        changed = [[w if draw.random() > rate else "z" for w in text.split()] for text in references]
        texts[name] = [" ".join(line) for line in changed]
        rows = [{"prediction": text, "references": [r]} for text, r in zip(texts[name], references, strict=True)]
        write_answers(study, name, rows, BLEU().corpus_score(texts[name], [references]).score)

    def bleu(name: str, rows: Any) -> float:
        picked = [texts[name][row] for row in rows], [[references[row] for row in rows]]
        return float(BLEU().corpus_score(*picked).score)

    both = [[bleu(name, rows) for rows in drawn_rows(20)] for name in texts]
    low, high = np.percentile(np.subtract(both[1], both[0]), [2.5, 97.5])
    record = next(one for one in table2([read_study(study)]) if one["method"] == "tl6")
    assert numbers(record, "difference_low", "difference_high") == pytest.approx([low, high], rel=1e-9)


def test_table3_compares_layers_with_tl5_and_tl5_with_the_best_layer(tmp_path: Path) -> None:
    runs = {"lora-r4-lr1e-4-layer1": (30.0, 1.0), "lora-r4-lr1e-4-layer2": (40.0, 1.0), "tl5-r4-lr1e-4": (45.0, 1.0)}
    study, scores = random_study(tmp_path / "study", 3, points=runs)
    one, two, tied = scores.values()
    drawn = drawn_rows(150)
    for record in table3([read_study(study)]):
        ours, other = {"layer_1": (one, tied), "layer_2": (two, tied), "tl5": (tied, two)}[record["adapter"]]
        want = expected((ours - other).mean(1), (ours - other)[:, drawn].mean(-1))
        assert numbers(record, "difference", "difference_low", "difference_high") == pytest.approx(list(want[:3]))
    text = table3_markdown([read_study(study)])
    assert re.search(r"\| squad \(EM\), difference \| -\d+\.\d\d \(-[^|]*\) \| -[^|]* \| \d+\.\d\d \([^|]*\) \|", text)
    assert "tl5 (of tl5: to the layer with the best score), paired by test row and seed" in text


def test_scores_of_other_rows_or_without_rows(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", seeds=2)
    write_answers(study, "lora-r2-lr1e-4", [{"score": 50.0}] * 500, 50.0)
    write_scored(study, "tl6-r2-lr1e-4", 40.0)  # its answers were removed
    record = next(one for one in table2([read_study(study)]) if one["method"] == "tl6")
    assert numbers(record, "score", "low", "high") == [40.0, 39.0, 41.0] and "difference" not in record
    write_scored(study, "tl6-r2-lr1e-4-seed1235", 42.0)
    said = f"{study}/scores/tl6-r2-lr1e-4: its predictions.jsonl is missing; remove the folder and start again"
    assert refusal(lambda: table2([read_study(study)])) == said
    file = study / "scores" / "tl6-r2-lr1e-4" / "predictions.jsonl"
    row = {"prompt": "other", "prediction": "", "references": ["x"], "score": 1.0}
    file.write_text((json.dumps(row) + "\n") * 500)
    assert f"its test rows are not those of {study}/scores/lora-r2-lr1e-4; remove" in refusal(read_study, study)
    for broken in ("{}\n", "x\n", "", '{"prompt": "p", "references": ["x"], "score": null}\n'):
        file.write_text(broken)
        assert "predictions.jsonl: not the predictions of tiedlora evaluate; remove" in refusal(read_study, study)


def test_latex_has_the_cells_of_the_markdown(tmp_path: Path) -> None:
    study, _ = random_study(tmp_path / "my_study", 3, points=POINTS)
    edit_json(study / "base.json", model="a_b/c_d&e#1")
    table = tables.table2_layout([read_study(study)])
    lines = table.latex().splitlines()
    assert lines[:2] == [r"\begin{table}", r"\caption{Table 2: c\_d\&e\#1 on squad (EM)}"]
    width = len(table.header)
    assert lines[2] == rf"\begin{{tabular}}{{ll{'r' * (width - 2)}}}" and lines[3] == r"\toprule"

    def plain(cell: str) -> str:
        for text, symbol in ((r"$\pm$", "±"), ("$-$", "-"), (r"\%", "%"), (r"\_", "_"), ("-{}-", "--")):
            cell = cell.replace(text, symbol)
        return cell.strip()

    rows = [[plain(cell) for cell in line.removesuffix(r" \\").split(" & ")] for line in lines if " & " in line]
    marks = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.markdown().splitlines()]
    shown = [cells for cells in marks if len(cells) == width and set(cells) != {"---"}]
    assert rows == [list(table.header), *(cells for cells in shown if cells[0] != "method")]
    assert sum(r"\multicolumn" in line for line in lines) == 3 and lines[-1] == r"\end{table}"
    assert tables.latex_text("a_b 5 % ~ ^ {x} \\ 1e-4 -2.5 (-1 to --ranks $") == (
        r"a\_b 5 \% \textasciitilde{} \textasciicircum{} \{x\} \textbackslash{} 1e-4 $-$2.5 ($-$1 to -{}-ranks \$"
    )


def test_the_figures_have_the_intervals_over_seeds(tmp_path: Path) -> None:
    read = read_study(random_study(tmp_path / "study", 3, points=POINTS)[0])
    score = read.results[Point("tl6", 8)].score
    assert score is not None and score.spread is not None
    shown = figure_lines([read])["tl6"][8]
    assert (shown.value, shown.low, shown.high) == pytest.approx((score.value, score.low, score.high))
