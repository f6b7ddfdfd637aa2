"""Files that came from somebody else: what they name is not run, read, overwritten or printed raw."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import bounded
from support.folders import python
from support.native_files import with_adapter, write_native
from support.run_files import edit_json
from support.sweep_runs import study_arguments, write_study_base
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.base_identity import sample_hash
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import read_header
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.batch import plan_batches
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.job_settings import parse_launch, parse_sweep
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.verify import verify_export
from megatron_tiedlora.data.readers import read_rows
from megatron_tiedlora.data.task import Example
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.engine.engine_json import load_engine_config
from megatron_tiedlora.evaluation.metrics import METRICS, Answer
from megatron_tiedlora.runtime.run_folder import read_metrics


def refused(path: Path, zero: Any = None, **sections: Any) -> str:
    file = path / "engine.json"
    file.write_text(json.dumps({**sections, "zero_optimization": {"stage": 3, **(zero or {})}}))
    return refusal(load_engine_config, str(file), batches=plan_batches(8, 2, 2), gradient_clipping=0.5)


# The DeepSpeed JSON -----------------------------------------------------------------------------------------------


def test_a_deepspeed_json_names_no_output_file(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    said = refused(tmp_path, flops_profiler={"enabled": True, "output_file": str(notes)})
    assert "engine.json: flops_profiler.output_file is" in said and "remove it" in said


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
@pytest.mark.parametrize(
    "offload",
    [{"device": "nvme"}, {"device": "nvme", "nvme_path": "/"}, {"device": "cpu", "nvme_path": "/"}],
)
def test_a_deepspeed_json_names_no_folder_for_swapping(tmp_path: Path, section: str, offload: dict[str, str]) -> None:
    """DeepSpeed removes what is in it."""
    said = refused(tmp_path, {section: offload})
    assert f"zero_optimization.{section} writes outside the run folder" in said and '"device": "cpu"' in said


# A study's folder and settings -------------------------------------------------------------------------------------

SHELL = "--no_python --no_local_rank /bin/sh -c 'id > {}; exit 1' --"


def test_launcher_arguments_of_a_strangers_study_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a study that was sent, whose folder alone continues it."""
    monkeypatch.chdir(tmp_path)
    base, test = write_study_base(tmp_path / "base")
    arguments = study_arguments(base, test, tmp_path / "study")
    given = {word[2:].split("=")[0]: word.split("=", 1)[1] for word in arguments}
    Path("study").mkdir()
    starts = {"study/sweep.yaml": ["--output_dir=study"], "mine.yaml": ["--output_dir=new", "--config=mine.yaml"]}
    for file, flags in starts.items():
        Path(file).write_text(yaml.safe_dump({**given, "launcher_args": SHELL.format("harm")}))
        said = refusal(call, "sweep", flags)
        assert said.startswith(f"{file}: launcher_args are not read from a file")
        assert "give --launcher_args again on the command line" in said
    assert not Path("harm").exists() and not Path("new").exists()
    assert [item.name for item in Path("study").iterdir()] == ["sweep.yaml"]


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        ("--num_gpus 4", True),
        ("--num_gpus=4 --master_port 29501", True),
        ("", True),
        ("--num_gpus 4 train.py", False),
        ("train.py --num_gpus 4", False),
        ("--num_gpus --module", False),
        ("'--num_gpus 4'", False),
        ("--num_gpu 4", False),
        ("--incl localhost:0", False),
        ("--num_gpus ４", False),
        ("--num_gpus", False),
        ("-- x", False),
        ("--num_gpus 4 --ssh_port 22", False),
        *((f"{flag} x", False) for flag in ("--hostfile", "-H", "--launcher", "--launcher_args", "--master_addr")),
        *((f"{flag} x", False) for flag in ("--venv_script", "--include", "--config", "--ssh_port")),
        *((flag, False) for flag in ("--module", "--no_python", "--no_local_rank", "--show_command", "--force_multi")),
    ],
)
def test_launcher_arguments_that_a_file_may_give(tmp_path: Path, words: str, taken: bool) -> None:
    config = f"--config={tmp_path}/s.yaml"
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"output_dir": "x", "launcher_args": words}))
    for given in ("--module", words):
        assert parse_sweep([config, f"--launcher_args={given}"]).settings.launcher_args == given
    if taken:
        assert parse_sweep([config]).settings.launcher_args == words
    else:
        assert "s.yaml: launcher_args are not read from a file" in refusal(parse_sweep, [config])


def test_launcher_arguments_of_the_deepspeed_launcher_start_nothing() -> None:
    """What the user gives is read as flags of tiedlora run, of which none runs a word of it."""
    for words in (SHELL.format("x"), "--module", "--num_gpus 4 train.py", "--config=x", "-- x"):
        with pytest.raises(UserError, match="--launcher_args: unknown"):
            print(parse_sweep(["--output_dir=x", f"--launcher_args={words}"]).launcher)


def test_run_py_takes_no_launcher_arguments_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("launcher_args: --no_python\n")
    assert "unknown setting 'launcher_args'" in refusal(parse_launch, [f"--config={tmp_path}/s.yaml"])


# A model folder that is merged -------------------------------------------------------------------------------------

SECRET = "TOPSECRET, nobody else's\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.jinja").write_text(SECRET)
    return tmp_path / "secret" / "key.jinja"


def refused_merge(model: Path, folder: Path, output: Path) -> str:
    """What the merge of an adapter of `model` into its changed copy `folder` is refused with."""
    said = refusal(merge_adapter, find_model(str(folder)), with_adapter(model, "tl6")[1], output)
    assert sorted(item.name for item in output.parent.iterdir()) == ["model", "secret"]  # nothing was written
    return said


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "NOTICE.txt", "x.jinja", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
     "additional_chat_templates/a.jinja", "additional_chat_templates", "model.safetensors"],
)  # fmt: skip
def test_merging_copies_nothing_from_where_links_lead(model: Path, secret: Path, tmp_path: Path, name: str) -> None:
    """Neither files nor a folder of templates, nor the weights."""
    others = {"additional_chat_templates": secret.parent, "model.safetensors": secret.with_name("weights")}
    folder, target = shutil.copytree(model, tmp_path / "model"), others.get(name, secret)
    (folder / name).parent.mkdir(exist_ok=True)
    if name == "model.safetensors":
        (folder / name).rename(target)
    relative = os.path.relpath(target, (folder / name).parent)
    for link in (str(target), f"../model/{relative}" if "/" not in name else relative):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(link)
        said = refused_merge(model, folder, tmp_path / "output")
        assert said.startswith(f"{folder / name}: leads to {target}, outside the model folder")
        assert "remove the link" in said


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json"])
def test_merging_waits_for_no_pipe(model: Path, secret: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert "is a pipe, a socket or a device" in refused_merge(model, folder, tmp_path / "output")
    (folder / name).unlink()
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the name of a socket is short
        server.bind(name)
        assert "is a pipe, a socket or a device" in refused_merge(model, folder, tmp_path / "output")


def test_merging_takes_the_folders_own_links_and_the_hubs(model: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    folder = hub / "snapshots" / "0123"
    folder.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, hub / "blobs" / str(number))
        (folder / file.name).symlink_to(f"../../blobs/{number}")
    (folder / "LICENSE").write_text("mine")
    (folder / "LICENSES").mkdir()
    (folder / "NOTICE").symlink_to("LICENSE")
    os.link(folder / "LICENSE", folder / "NOTICE.txt")
    (folder / "NOTICE.old").symlink_to("nothing")
    source, adapter, _ = with_adapter(folder, "tl6")
    merge_adapter(source, adapter, tmp_path / "output")
    for name in ("LICENSE", "NOTICE", "NOTICE.txt"):
        assert (tmp_path / "output" / name).read_text() == "mine" and not (tmp_path / "output" / name).is_symlink()
    assert load_tokenizer(tmp_path / "output").get_vocab() == load_tokenizer(model).get_vocab()
    assert not (tmp_path / "output" / "NOTICE.old").exists()


def test_merging_takes_no_tokenizer_that_leads_elsewhere(model: Path, secret: Path, tmp_path: Path) -> None:
    """That of --tokenizer, which may be a stranger's too."""
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").symlink_to(secret)
    write_native(tmp_path / "adapter", model, with_adapter(model, "tl6")[2])
    given = [f"--adapter={tmp_path / 'adapter'}", f"--model={model}", f"--tokenizer={folder}"]
    assert "chat_template.jinja: leads to" in refusal(call, "merge", [*given, f"--output={tmp_path / 'output'}"])
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("key", ["vocab", "merges"])
def test_a_tokenizers_settings_name_no_other_file(secret: Path, tmp_path: Path, key: str) -> None:
    """transformers would read it as the vocabulary, and write it again."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("a\n[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\n")
    settings = {"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]", key: str(secret)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert f"tokenizer_config.json: {key} '{secret}' names another file" in refusal(load_tokenizer, folder)


# Sizes that lie, and what other libraries would do with a file --------------------------------------------------------


def test_a_header_of_many_tensors_is_read_once(model: Path, tmp_path: Path) -> None:
    """Some thousands of tensors that nobody needs, and more than any file has."""
    file = tmp_path / "model" / "model.safetensors"
    shutil.copytree(model, file.parent)
    raw = file.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(raw) - begin] * 2}

    def write(num_empty: int) -> None:
        entries = {**json.loads(raw[8:begin]), **{f"x{index}": empty for index in range(num_empty)}}
        header = json.dumps(entries).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[begin:])

    write(90_000)
    shape = find_model(str(file.parent)).shape
    with bounded(20.0), BaseWeights(file.parent, shape) as weights:
        sample_hash(weights)
    write(100_001)
    with pytest.raises(UserError, match=r"its header lists 100,\d+ tensors"):  # and no cycle that keeps it in memory
        read_header(file)


def test_a_header_of_endless_numbers_is_one_line(tmp_path: Path) -> None:
    text = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, %s]}}' % (b"9" * 4300)
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    assert "not a complete safetensors file" in refusal(read_header, tmp_path / "x")


def test_metrics_of_a_huge_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    row = '{"step": 1, "split": "train", "loss": 1.0}\n'
    file.write_text(row)
    with file.open("r+b") as stream:
        stream.truncate(2**28)
    with bounded(5.0):
        assert read_metrics(file) == [json.loads(row)]


def test_a_json_file_of_many_small_objects(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[" + "{}," * 8_000_000 + "{}]")
    assert "write it as .jsonl" in refusal(read_rows, file, limit=2)


@pytest.mark.timeout(120)
def test_verifying_hands_peft_no_pattern_that_is_not_read_here(model: Path, tmp_path: Path) -> None:
    source, native, _ = with_adapter(model, "tl6")
    export_peft(source, native, tmp_path / "peft")
    edit_json(tmp_path / "peft" / "adapter_config.json", target_modules="(.*)*(.*)*(.*)*!")
    assert "Write a list of names" in refusal(verify_export, source, native, peft=tmp_path / "peft")


def test_a_matplotlibrc_of_the_current_folder_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}\n')
    code = "from megatron_tiedlora.runtime.run_folder import *; plot_losses(Path('metrics.jsonl'), Path('loss.png'))"
    done = python("-c", code, folder=tmp_path, PATH="/nowhere")
    assert done.returncode == 0 and (tmp_path / "loss.png").is_file(), done.stderr


@pytest.mark.parametrize("name", ["take_over", "base_differs"])
def test_a_file_decides_nothing_that_a_user_decides_at_a_start(tmp_path: Path, name: str) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(f"{name}: true\nresume: auto\n")
    said = refusal(parse_settings, [f"--config={file}"], Settings)
    assert f"{name} is not read from a file; give --{name} on the command line" in said


def rouge(prediction: str, *references: str) -> float:
    example = Example("p", " x", "r:1", references=references)
    return METRICS["rougeL"].sample(Answer(prediction, example, ()))


def test_rouge_l_is_the_library_s() -> None:
    """Bit for bit, on texts of few words, so that subsequences are long; and in time on long ones."""
    from rouge_score.rouge_scorer import RougeScorer

    draw, scorer = random.Random(5), RougeScorer(["rougeL"], use_stemmer=True)
    words = ["running", "runs", "a", "the", "cats", "cat", "...", "x1", "é", "Sunday"]
    for _ in range(2000):
        prediction, *references = (" ".join(draw.choices(words, k=draw.randint(1, 14))) for _ in range(3))
        expected = scorer.score_multi(references, prediction)["rougeL"].fmeasure
        assert rouge(prediction, *references) == 100.0 * expected, (prediction, references)
    long = " ".join(draw.choices("abcdefghij", k=200_000))
    started = time.process_time()
    assert 0 < rouge(" ".join(draw.choices("abcdefghij", k=500)), long) < 1
    assert time.process_time() - started < 5
