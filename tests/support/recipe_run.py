"""A recipe of `tinker_cookbook` in a Python that has it: `python -m support.recipe_run RECIPE FILE`, the key in
TINKER_API_KEY. FILE is JSON: the tokenizer's folder, the renderer and the settings of the recipe.

    pip install tinker==0.38.0 torch chz datasets aiohttp blobfile cloudpickle pillow pyrage termcolor tiktoken \\
        pylatexenc sympy
    pip install --no-deps tinker_cookbook==0.6.1

The SDK and the training code are the installed ones. Replaced is only what has to be downloaded: the data sets, by
small generated ones, the tokenizer of the model's name, and its row in the cookbook's table of renderers. Recipes of
RL also get a reward that a small model can earn: the fraction of digits in an answer."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chz
import datasets
from tinker_cookbook import model_info, tokenizer_utils
from transformers import AutoTokenizer

MODEL = "meta-llama/demo"  # the name that the server gives to its base
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load_dataset(path: str, *_: Any, split: str | None = None, **__: Any) -> Any:
    """Return generated rows with the columns of a data set of the hub, or of one split. They are the same at every
    call."""
    rows = {"HuggingFaceH4/no_robots": _chats, "openai/gsm8k": _questions, "Anthropic/hh-rlhf": _preferences}[path]
    sizes = {"train": 256, "test": 8}
    found = datasets.DatasetDict({
        name: datasets.Dataset.from_list(list(rows(random.Random(name), size))) for name, size in sizes.items()
    })  # fmt: skip
    return found if split is None else found[split]


def _chats(draw: random.Random, size: int) -> Iterator[dict[str, Any]]:
    for _ in range(size):
        numbers = [draw.randrange(10) for _ in range(4)]
        question = f"Write these digits as words: {' '.join(map(str, numbers))}"
        answer = ", then ".join(NUMBERS[number] for number in numbers)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _questions(draw: random.Random, size: int) -> Iterator[dict[str, Any]]:
    for _ in range(size):
        first, second = draw.randrange(100), draw.randrange(100)
        yield {"question": f"What is {first} plus {second}?", "answer": f"#### {first + second}"}


def _preferences(draw: random.Random, size: int) -> Iterator[dict[str, Any]]:
    for _ in range(size):
        number = draw.randrange(10)
        asked = f"\n\nHuman: Which digit is {NUMBERS[number]}?\n\nAssistant: "
        yield {"chosen": f"{asked}It is {number}.", "rejected": f"{asked}I do not want to tell you."}


def digits(_: Any, response: str) -> float:
    """Return the fraction of digits in a response."""
    return sum(map(str.isdigit, response)) / max(1, len(response))


def sl_loop(settings: dict[str, Any]) -> None:
    """Supervised training in one plain loop."""
    from tinker_cookbook.recipes import sl_loop as recipe

    recipe.main(recipe.Config(**settings))


def rl_loop(settings: dict[str, Any]) -> None:
    """Reinforcement learning in one plain loop."""
    from tinker_cookbook.recipes import rl_loop as recipe

    recipe.get_reward = lambda response, answer: digits(answer, response)
    recipe.main(recipe.Config(**settings))


def dpo(settings: dict[str, Any]) -> None:
    """Preferences, by the command of the recipe."""
    from tinker_cookbook.recipes.preference.dpo import train as recipe

    recipe.cli_main(recipe.CLIConfig(dataset="hhh", **settings))


def sl_basic(settings: dict[str, Any]) -> None:
    """Supervised training with evaluations. `batch_size` goes to the data set, as the recipe sets it there."""
    from tinker_cookbook.recipes import sl_basic as recipe

    batch_size = settings.pop("batch_size")
    config = recipe.build_config_blueprint(settings["model_name"]).apply(settings).make()
    data = config.dataset_builder
    data = chz.replace(data, common_config=chz.replace(data.common_config, batch_size=batch_size))
    asyncio.run(recipe.train.main(chz.replace(config, dataset_builder=data)))


def rl_basic(settings: dict[str, Any]) -> None:
    """Reinforcement learning with evaluations and a penalty on the KL divergence from the base, whose factor is
    `kl_penalty_coef`. `batch_size` and `group_size` go to the data set."""
    from tinker_cookbook.recipes import rl_basic as recipe
    from tinker_cookbook.recipes.math_rl.math_env import MathEnv

    MathEnv.check_answer = digits
    sizes = {name: settings.pop(name) for name in ("batch_size", "group_size")}
    config = recipe.build_config_blueprint(settings["model_name"]).apply(settings).make()
    reference = recipe.train.KLReferenceConfig(base_model=MODEL)
    data = chz.replace(config.dataset_builder, **sizes)
    asyncio.run(recipe.train.main(chz.replace(config, dataset_builder=data, kl_reference_config=reference)))


RECIPES: dict[str, Callable[[dict[str, Any]], None]] = {
    "sl_loop": sl_loop, "rl_loop": rl_loop, "dpo": dpo, "sl_basic": sl_basic, "rl_basic": rl_basic,
}  # fmt: skip


def run(recipe: str, tokenizer: str, renderer: str, settings: dict[str, Any]) -> None:
    """Run a recipe to its end. Its metrics are in `log_path` of its settings."""
    datasets.load_dataset = load_dataset
    model_info.get_llama_info()[MODEL.split("/")[1]] = model_info.ModelAttributes(
        "meta-llama", "1", "135M", True, (renderer,)
    )
    found = AutoTokenizer.from_pretrained(tokenizer)
    tokenizer_utils.register_tokenizer(settings["model_name"], lambda: found)
    RECIPES[recipe](settings)


if __name__ == "__main__":
    run(sys.argv[1], **json.loads(Path(sys.argv[2]).read_text()))
