"""Measure the learning rates of docs/study/rates.csv, and fit the rule of --learning_rate auto to them.

    python docs/study/fit_rates.py bases gsm8k/train.jsonl xquad.en.json FOLDER    data, and small LLaMAs from scratch
    python docs/study/fit_rates.py sweep FOLDER/d64 FOLDER rates.csv ranks=2,8,32  every method at rates around the rule
    python docs/study/fit_rates.py fit rates.csv                                   constants, errors, and losses
"""

import csv
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_tiedlora.adapters.learning_rates import RULES, auto_rate

SEED, SEEN, VALIDATION, LONGEST = 1234, 3500, 24, 400  # GSM8K's rows for bases, to validate; characters of a row
BASES = {"d32": (32, 400), "d64": (64, 700), "d128": (128, 250)}  # width, steps of pre-training
KEYS = ("base", "width", "layers", "adapted", "linears", "method", "rank", "scale", "steps", "rate")
# Expected exponents of width and rank. A trained A changes A x by rate x width. If the update is of second order in the
# rate, as a factor that starts at zero is trained too, the exponent is half of that. With alpha = rank, rank terms add.
EXPECTED = {"lora": (0.5, 0.4), "vera": (0.0, 0.0), "tl1": (1.0, 0.5), "tl2": (0.5, 0.25), "tl3": (0.0, 0.6)}
EXPECTED |= {"tl4": (0.0, 0.6), "tl5": (0.5, 0.4), "tl6": (0.5, 0.25)}
LAYERS, LINEARS, MOST_STEPS = 0.4, 0.3, 24  # expected exponents; longer runs are only compared with the rule
NOISE, PRIOR = 0.5, 0.25  # standard deviations: of a measured log2 of the best rate, and of an exponent


def make_bases(gsm8k, xquad, target, *names):
    """Write the task's rows, and train small models on XQuAD and on GSM8K's other rows in another format."""
    rows, folder = [json.loads(line) for line in Path(gsm8k).read_text().splitlines()], Path(target)
    short, texts = [row for row in rows[SEEN:] if len(row["question"] + row["answer"]) <= LONGEST], []
    folder.mkdir(parents=True, exist_ok=True)
    for part, own in (("train", short[:-VALIDATION]), ("validation", short[-VALIDATION:])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    articles = [article["paragraphs"] for article in json.loads(Path(xquad).read_text())["data"]]
    for paragraph in itertools.chain(*articles):
        texts += [paragraph["context"], *(qa["question"] for qa in paragraph["qas"])]
    for row in rows[:SEEN]:
        solution, answer = re.sub("<<.*?>>", "", row["answer"]).split("\n#### ")
        texts.append(f"Problem: {row['question']}\nSolution: {solution} So the answer is {answer}.")
    bpe, parts = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), parts])
    options = {"vocab_size": 2048, "special_tokens": ["<s>", "</s>"], "initial_alphabet": parts.alphabet()}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    ids = [token for text in texts for token in (0, *tokenizer.encode(text), 1)]
    tokens = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    for name in names or BASES:
        width, steps = BASES[name]
        torch.manual_seed(SEED)
        sizes = {"hidden_size": width, "intermediate_size": width * 8 // 3 // 32 * 32, "num_hidden_layers": 6}
        sizes |= {"num_attention_heads": max(2, width // 32), "num_key_value_heads": max(1, width // 64)}
        sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "tie_word_embeddings": True}
        sizes |= {"bos_token_id": 0, "eos_token_id": 1}
        model, rate = LlamaForCausalLM(LlamaConfig(**sizes)), 3e-3 * (64 / width) ** 0.5
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            batch = tokens[torch.randint(len(tokens), (16,))]
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def sweep(base, data, table, *options):
    """Train all at three rates around the rule's, in one run, and then at one more if the best is at an end."""
    given = {"methods": ",".join(RULES), "ranks": "8", "scales": "1", "steps": "24", "batch": "4", "spacing": "1"}
    given |= {"dtype": "fp32", "targets": "qkv", "layers": "", **dict(option.split("=") for option in options)}
    config = json.loads(Path(base, "config.json").read_text())
    width, depth, steps = config["hidden_size"], config["num_hidden_layers"], int(given["steps"])
    adapted = len(given["layers"].split(",")) if given["layers"] else depth
    linears, spacing = 4 if given["targets"] == "all" else 1, int(given["spacing"])
    points = list(itertools.product(*(given[name].split(",") for name in ("methods", "ranks", "scales"))))
    for _ in range(2):
        known, wanted = read_groups(table), []
        for method, rank, scale in points:
            group = (Path(base).name, width, depth, adapted, linears, method, int(rank), float(scale), steps)
            shape = {"width": width, "num_layers": adapted, "num_linears": linears, "steps": steps}
            middle = math.log2(auto_rate(method, rank=int(rank), scale=float(scale), **shape) / 1e-3)
            powers = [middle - spacing, middle, middle + spacing]
            if done := known.get(group):
                best = min(done, key=done.get)
                powers = [best - spacing] * (best == min(done)) + [best + spacing] * (best == max(done))
            wanted += [(*group, 1e-3 * 2.0 ** round(power)) for power in powers]
        losses = train_all(base, data, wanted, given) if wanted else []
        with Path(table).open("a", newline="") as file:
            rows = [(*run, loss) for run, loss in zip(wanted, losses, strict=True)]
            csv.writer(file).writerows(rows if known else [(*KEYS, "loss"), *rows])


def train_all(base, data, runs, given):
    """Train all in one run of many adapters, and return the last validation losses; inf if a run diverged."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [(method, rank, rank * scale, rate) for *_, method, rank, scale, _, rate in runs]
        names = ("name", "method", "rank", "alpha", "learning_rate")
        entries = [dict(zip(names, (f"a{number}", *own), strict=True)) for number, own in enumerate(parts)]
        Path(folder, "adapters.yaml").write_text(json.dumps(entries))
        flags = {name: given[name] for name in ("dtype", "targets", "layers") if given[name]}
        flags |= {"train_file": f"{data}/train.jsonl", "validation_file": f"{data}/validation.jsonl", "task": "gsm8k"}
        flags |= {"model": base, "adapters": f"{folder}/adapters.yaml", "output_dir": f"{folder}/run", "seed": SEED}
        flags |= {"max_steps": given["steps"], "eval_interval": given["steps"], "max_length": 400, "report_to": "none"}
        flags |= dict.fromkeys(("global_batch_size", "micro_batch_size"), given["batch"])
        words = [*(f"--{name}={value}" for name, value in flags.items()), f"--warmup_steps={int(given['steps']) // 10}"]
        subprocess.run([sys.executable, "-m", "megatron_tiedlora", "train", *words], check=False)
        metrics = [Path(folder, "run", own["name"], "metrics.jsonl").read_text().splitlines() for own in entries]
        found = [[row["loss"] for row in map(json.loads, rows) if row["split"] == "validation"] for rows in metrics]
        return [round(losses[-1], 4) if len(losses) > 1 and math.isfinite(losses[-1]) else math.inf for losses in found]


def read_groups(table):
    """Return {everything but the rate: {log2 of rate / 1e-3: loss}}."""
    found, kinds = {}, (str, int, int, int, int, str, int, float, int, float)
    for row in csv.DictReader(Path(table).read_text().splitlines()) if Path(table).exists() else ():
        *group, rate = (kind(row[key]) for kind, key in zip(kinds, KEYS, strict=True))
        found.setdefault(tuple(group), {})[math.log2(rate / 1e-3)] = float(row["loss"])
    return found


def best_rate(losses):
    """Return log2 of the rate with the lowest loss: by a parabola through the best three, or the end of the grid."""
    x = sorted(losses)
    at = x.index(min(losses, key=losses.get))
    near = x[max(at - 1, 0) : at + 2]
    if len(near) < 3 or math.inf in (losses[i] for i in near):
        return x[at]
    curve = np.polyfit(near, [losses[i] for i in near], 2)
    return float(-curve[1] / (2 * curve[0]))


def row_of(group):
    """Return the factors in log2 of the rate: a constant and two exponents of each method, and what methods share."""
    _, width, _, adapted, linears, method, rank, *_ = group
    row = np.zeros((len(RULES), 3))
    row[list(RULES).index(method)] = 1.0, -math.log2(width / 576), -math.log2(rank / 8)
    return np.append(row, [-math.log2(adapted / 30), -math.log2(linears)])


def fitted(points):
    """Return the constants and exponents that fit log2 of the best rates, with the expected exponents as a prior."""
    mean = np.append([[0.0, *EXPECTED[method]] for method in RULES], [LAYERS, LINEARS])
    weights = np.append(np.tile([1e-3, 1 / PRIOR, 1 / PRIOR], len(RULES)), [1 / PRIOR, 1 / PRIOR])
    rows = np.array([row_of(group) for group in points]) / NOISE
    values = np.append(np.array(list(points.values())) / NOISE, weights * mean)
    return np.linalg.lstsq(np.vstack([rows, np.diag(weights)]), values)[0]


def fit(table):
    """Print the fitted constants, the errors at bases that were left out, and what the package's rule loses."""
    groups, errors, lost = read_groups(table), [], []
    used = {group: best_rate(groups[group]) for group in groups if group[7] == 1.0 and group[8] <= MOST_STEPS}
    found = fitted(used)
    for method, (rate, width, rank) in zip(RULES, found[:-2].reshape(-1, 3), strict=True):
        print(f"{method:5} {1e-3 * 2**rate:.1e} width {width:.2f} rank {rank:.2f}")
    print("layers, linears:", found[-2:].round(2))
    for base in sorted({group[0] for group in used}):
        others = fitted({group: value for group, value in used.items() if group[0] != base})
        apart = np.array([row_of(group) @ others - value for group, value in used.items() if group[0] == base])
        print(f"without {base}: error {apart.mean():+.2f}, rms {np.sqrt((apart**2).mean()):.2f} (log2)")
    for group, losses in groups.items():
        _, width, _, adapted, linears, method, rank, scale, steps = group
        shape = {"width": width, "num_layers": adapted, "num_linears": linears, "steps": steps}
        best, rate = best_rate(losses), auto_rate(method, rank=rank, scale=scale, **shape)
        rule, (x, y) = math.log2(rate / 1e-3), zip(*sorted(losses.items()), strict=True)
        errors.append(rule - best)
        lost.append(np.interp(rule, x, y) - min(y))
        print(*group, f"best {1e-3 * 2**best:.1e}, rule {rate:.1e}, loss {min(y):.3f}, {lost[-1]:+.3f} by the rule")
    print(f"rule: rms {np.sqrt(np.mean(np.square(errors))):.2f} (log2), largest {max(map(abs, errors)):.2f};", end=" ")
    print(f"loss {np.mean(lost):+.3f} in the mean, {max(lost):+.3f} at most; {len(groups)} grids")


if __name__ == "__main__":
    {"bases": make_bases, "sweep": sweep, "fit": fit}[sys.argv[1]](*sys.argv[2:])
