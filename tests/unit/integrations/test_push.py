"""Publishing an adapter: what the folder holds, and what the hub is sent."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from support.folders import python
from support.hub_stand_in import Hub, hub_stand_in
from support.native_files import with_adapter, write_exports, write_native
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.installation import EXTRAS
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.adapter_settings import PushSettings
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.convert.verify import verify_export
from megatron_tiedlora.integrations.push import check_hub_id, write_published
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.training.start import write_run_settings

SCORES = {
    "before": {"gsm8k": {"score": 10.0, "n": 24, "confidence_interval": [2.0, 20.0]}},
    "after": {"gsm8k": {"score": 12.5, "n": 24, "confidence_interval": [4.0, 25.0]}},
}
SETTINGS = {"task": "gsm8k", "method": "tl6", "rank": 4, "targets": ["qkv"], "train_file": "/secret/rows.jsonl",
            "packing": False, "max_steps": 3, "dropout": 0.1, "layers": [1, 2, 3], "output_dir": "/secret/out",
            "prompt_template": "```{prompt}", "versions": {"torch": "2.6"}}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("host") / "tiny-base")


@pytest.fixture(scope="module")
def run_folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    folder.mkdir()
    write_exports(folder, base)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / "scores.json").write_text(json.dumps(SCORES))
    (folder / "loss.png").write_bytes(b"png")
    return folder


def card(run: Path, output: Path, base: str | None = None, say: Callable[[str], object] = str) -> str:
    """The card of what is published of a run."""
    write_published(PushSettings(run=str(run), repo="me/demo", base_name=base, licence="mit"), output, say=say)
    return (output / "README.md").read_text()


def push(
    hub: Hub, *words: object, program: Sequence[str] = ("-m", "megatron_tiedlora")
) -> subprocess.CompletedProcess[str]:
    of_hub = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return python(*program, "push", *words, **of_hub, OMP_NUM_THREADS="1")


def test_the_folder_names_no_path_of_this_host(base: Path, run_folder: Path, tmp_path: Path) -> None:
    card(run_folder, tmp_path / "out")
    files = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    native = {"native/adapter_config.json", "native/adapter_model.safetensors"}
    exported = {"adapter_config.json", "adapter_model.safetensors", "tiedlora_export.json"}
    assert files == native | exported | {"README.md", "loss.png"}
    for file in files:
        content = (tmp_path / "out" / file).read_bytes()
        assert str(base.parent).encode() not in content and b"/secret" not in content, file
    source, adapter, _ = with_adapter(base, "tl6")
    assert verify_export(source, adapter, peft=tmp_path / "out", inside="none").passed
    back = load_native_adapter(tmp_path / "out" / "native")
    assert back.base_identity.base_model == "tiny-base"
    assert back.sha256 == load_native_adapter(run_folder / "adapter").sha256


def test_the_card(run_folder: Path, tmp_path: Path) -> None:
    _, front, body = card(run_folder, tmp_path / "out", base="org/base").split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/base", "adapter")
    assert metadata["library_name"] == "peft" and "tied-lora" in metadata["tags"]
    (result,) = metadata["model-index"][0]["results"]
    assert (result["metrics"][0]["type"], result["metrics"][0]["value"]) == ("gsm8k", 12.5)
    assert "method `tl6` of rank 4 on qkv of 3 layers" in body
    assert "| after training | `gsm8k` | 12.50 | 4.00 to 25.00 | 24 |" in body
    assert "tiedlora train --model org/base --" in body and "--dropout 0.1" in body and "--layers" not in body
    assert "--train_file rows.jsonl" in body and "--prompt_template '```{prompt}'" in body and "--max_steps 3" in body
    assert "--output_dir" not in body and "torch 2.6" in body
    assert metadata["license"] == "mit"
    assert "from_pretrained('org/base')" in body and "from_pretrained(model, 'me/demo')" in body


# Values of flags of a run, the hub ids that it recorded, and what may be published of them.
NAMES = {
    "relative": ({"train_file": "clients/acme/train.jsonl"}, [], "--train_file train.jsonl"),
    "absolute": ({"train_file": "/clients/acme/train.jsonl"}, [], "--train_file train.jsonl"),
    "two": ({"validation_file": "clients/acme/a.csv, ~/clients/b.csv"}, [], "--validation_file a.csv,b.csv"),
    "weights": (
        {"train_file": "clients/acme/a.jsonl:0.5,../clients/b.jsonl:0.5"}, [], "--train_file a.jsonl:0.5,b.jsonl:0.5"
    ),
    "pattern": ({"train_file": "clients/acme/t*.jsonl"}, [], "--train_file 't*.jsonl'"),
    "folder": ({"train_file": "clients/acme/rows/"}, [], "--train_file rows"),
    "hub": (
        {"train_file": "org/set:main:train:0.5,clients/acme/b.jsonl:0.5"},
        ["org/set"],
        "--train_file org/set:main:train:0.5,b.jsonl:0.5",
    ),
    "hub, not recorded": ({"train_file": "org/set:main"}, None, "--train_file set:main"),
    "hub, badly recorded": ({"train_file": "org/set:main"}, "org/set", "--train_file set:main"),
    "tokenizer": ({"tokenizer": "clients/acme/tokenizer.model"}, [], "--tokenizer tokenizer.model"),
    "tokenizer of the hub": ({"tokenizer": "org/tokens"}, ["org/tokens"], "--tokenizer org/tokens"),
    "template": ({"chat_template": "clients/acme/chat.jinja"}, [], "--chat_template chat.jinja"),
    "adapter": ({"init_from": "clients/acme/first/adapter"}, [], "--init_from adapter"),
    "others": (
        {"output_dir": "clients/acme/out", "test_file": "clients/t.jsonl", "ds_config": "clients/zero.json",
         "resume": "clients/acme/step_1", "adapters": "clients/all.yaml"}, [], "tiedlora train"
    ),
}  # fmt: skip


@pytest.mark.parametrize("there", [False, True], ids=["from elsewhere", "from where they are"])
@pytest.mark.parametrize("case", NAMES)
def test_no_folder_is_published(
    base: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, *, there: bool
) -> None:
    given, recorded, expected = NAMES[case]
    monkeypatch.chdir(tmp_path)
    for value in given.values() if there else []:
        for name in (part.strip().rpartition(":")[0] or part for part in value.split(",")):
            if name.startswith("clients"):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).touch()
    adapter, run = load_native_adapter(run_folder / "adapter"), tmp_path / "run"
    base_of = replace(adapter.base_identity, tokenizer=given.get("tokenizer"))
    save_adapter(run / "adapter", replace(adapter, base_identity=base_of))
    record = {} if recorded is None else {"hub_names": recorded}
    (run / "run.yaml").write_text(yaml.safe_dump({**SETTINGS, **given, **record, "seed": 7}))
    assert expected in card(run, tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.*"):
        assert b"clients" not in file.read_bytes() and b"acme" not in file.read_bytes(), file
    named = load_native_adapter(tmp_path / "out" / "native").base_identity.tokenizer
    assert (named is None) is ("tokenizer" not in given) and (named is None or f"--tokenizer {named}" in expected)


def test_a_run_records_what_comes_from_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the record can be given to --config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients/acme").mkdir(parents=True)  # has the form of an id
    (tmp_path / "run").mkdir()
    (tmp_path / "rows.jsonl").touch()
    names = "org/set:main:train:0.25,clients/acme:0.25,rows.jsonl:0.25,other/set:0.25"
    words = [f"--train_file={names}", "--validation_file=third/set", "--tokenizer=org/tokens", f"--model={base}"]
    words += ["--test_file=test/set"]
    write_run_settings(planned(words, base), RunFolder(tmp_path / "run"))
    written = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert written["hub_names"] == ["org/set", "org/tokens", "other/set", "test/set", "third/set"]
    assert parse_settings(["--config", "run/run.yaml"], Settings).train_file == names


HOSTILE = ("<b>x</b>", "[a](http://x)", "<img src=x onerror=y>", "a|b", "`c`", "![d](http://x)", "e\n\n# f", "",
           "\x1b[2J", "&lt;", "__g__", "</code>", "h` <b>x</b> `i")  # fmt: skip


def test_names_of_a_strangers_run_are_no_markup(run_folder: Path, tmp_path: Path) -> None:
    """Of metrics, versions and tasks: seen by a parser of Markdown, the card has the elements that it always has."""
    shutil.copytree(run_folder, tmp_path / "run")
    scores = {moment: {name: SCORES["after"]["gsm8k"] for name in HOSTILE} for moment in ("before", "after")}
    (tmp_path / "run/scores.json").write_text(json.dumps(scores))
    versions = {name: name for name in HOSTILE}
    (tmp_path / "run/run.yaml").write_text(yaml.safe_dump({**SETTINGS, "task": HOSTILE[0], "versions": versions}))
    _, front, body = card(tmp_path / "run", tmp_path / "out").split("---\n", 2)
    (result,) = yaml.safe_load(front)["model-index"][0]["results"]
    assert result["dataset"]["name"] == "custom" and "<" not in front
    parsed = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [token for block in parsed for token in block.children or ()]
    assert {token.type for token in inline} == {"text", "code_inline", "link_open", "link_close", "image"}
    links = [token.attrs["href"] for token in inline if token.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2311.09578"]
    assert not {"html_block"} & {block.type for block in parsed}
    cells = [block for block in parsed if block.type == "td_open"]
    assert len(cells) == 5 * 2 * len(HOSTILE)
    shown = [token.content for token in inline if token.type == "code_inline"]
    assert "<b>x</b>" in shown and "[a](http://x) [a](http://x)" in shown and "a/b" in shown


@pytest.mark.parametrize(("method", "kind"), [("lora", "A [LoRA]("), ("vera", "A [VeRA]("), ("tl5", "A [Tied-LoRA](")])
def test_the_card_says_which_kind_of_adapter_it_is(base: Path, tmp_path: Path, method: str, kind: str) -> None:
    write_native(tmp_path / "one", base, with_adapter(base, method)[2])
    text = card(tmp_path / "one", tmp_path / "out")
    assert kind in text and ("tied" in text.lower().replace("tiedlora", "")) is (method == "tl5")


SAMPLES = 100  # so 1.5 epochs of 16 samples a step are 10 steps, fewer than the default warm-up of 50
COMMANDS: dict[str, tuple[list[str], set[str]]] = {
    "epochs": (["--epochs=1.5"], {"epochs", "method"}),
    "epochs, warm-up": (["--epochs=1.5", "--warmup_steps=4"], {"epochs", "warmup_steps", "method"}),
    "steps": (["--max_steps=7"], {"max_steps", "method"}),
    "a warm-up that was kept": (["--max_steps=60", "--warmup_steps=7"], {"max_steps", "warmup_steps", "method"}),
    "adapter": (
        ["--rank=4", "--alpha=6", "--layers=2", "--init_std_a=0.3", "--max_length=32", "--max_new_tokens=9"],
        {"max_steps", "method", "rank", "alpha", "layers", "init_std_a", "max_length", "max_new_tokens"},
    ),
    "rows": (
        ["--train_on=last_turn", "--add_bos=true", "--special_tokens_in_text=control"],
        {"max_steps", "method", "train_on", "add_bos", "special_tokens_in_text"},
    ),
    "template": (
        ["--prompt_template=-Q: {prompt}\n````\nA 'b':", "--targets=all", "--packing=false"],
        {"max_steps", "method", "prompt_template", "targets"},
    ),
}


def planned(words: list[str], base: Path) -> RunPlan:
    """The plan of `tiedlora train` with these arguments, of SAMPLES training samples."""
    settings = parse_settings(words, Settings)
    plan = plan_run(settings, rank=0, world_size=1, weights=False, source=find_model(str(base)))
    return plan.counted(SAMPLES)


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_of_the_card_gives_the_settings_of_the_run(
    base: Path, run_folder: Path, tmp_path: Path, case: str
) -> None:
    given, expected = COMMANDS[case]
    words = ["--model=tiny-base", "--train_file=rows.jsonl", "--method=tl5", "--global_batch_size=16", "--dtype=fp32"]
    settings = planned([*words, *given], base).resolved_settings()
    shutil.copytree(run_folder / "adapter", tmp_path / "run/adapter")
    (tmp_path / "run/run.yaml").write_text(yaml.safe_dump({**settings, "ranks": 1, "versions": {"torch": "2.10"}}))
    text = card(tmp_path / "run", tmp_path / "out")
    _, shown, after = text.split("## Training")[1].split("`" * 5 if case == "template" else "`" * 4)
    program, command, *flags = shlex.split(shown)
    assert (program, command) == ("tiedlora", "train") and "Versions:" in after
    again = planned(flags, base).resolved_settings()
    layout = {"packing", "save_interval"}  # it does not change what is trained
    assert {name: again[name] for name in again if name not in layout} == {
        name: settings[name] for name in settings if name not in layout
    }
    always = {"model", "task", "train_file", "global_batch_size", "dtype", "learning_rate", "eval_interval"}
    assert parse_settings(flags, Settings).model_fields_set == always | expected


def test_a_note_says_that_a_folder_names_no_base_on_the_hub(run_folder: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    card(run_folder, tmp_path / "named", base="org/base", say=notes.append)
    assert not notes
    card(run_folder, tmp_path / "out", say=notes.append)
    (note,) = notes
    assert note.startswith("the model card names the base model tiny-base, like its folder; give --base_name ORG/NAME")


LICENCES = {
    "of its card": ("---\nlicense: llama2\ntags: [a]\n---\n# Base\n", {"license": "llama2"}),
    "other": (
        "---\r\nlicense: other\r\nlicense_name: of <acme>\nlicense_link: https://acme.org/l\n---",
        {"license": "other", "license_name": "of <acme>", "license_link": "https://acme.org/l"},
    ),
    "a file of its repository": ("---\nlicense: other\nlicense_link: LICENSE\n---\n", {"license": "other"}),
    "two": ("---\nlicense: [mit, llama2]\n---\n", {}),
    "no id": ("---\nlicense: 'mit <b>'\n---\n", {}),
    "not YAML": ("---\nlicense: {\n---\n", {}),
    "a list": ("---\n- license\n---\n", {}),
    "not at the start": ("# Base\n---\nlicense: mit\n---\n", {}),
    "large": ("---\nlicense: mit\n---\n" + "x" * 2**20, {}),
    "none": (None, {}),
}


@pytest.mark.parametrize("case", LICENCES)
def test_the_licence_is_the_base_s_or_given_but_never_invented(
    base: Path, run_folder: Path, tmp_path: Path, case: str
) -> None:
    text, expected = LICENCES[case]
    model = Path(shutil.copytree(base, tmp_path / "tiny-base"))
    if text is not None:
        (model / "README.md").write_text(text)
    for given, licence in ((None, expected), ("apache-2.0", {"license": "apache-2.0"})):
        notes, output = list[str](), tmp_path / f"out-{given}"
        settings = PushSettings(run=str(run_folder), repo="me/demo", model=str(model), base_name="a/b", licence=given)
        write_published(settings, output, say=notes.append)
        metadata = yaml.safe_load((output / "README.md").read_text().split("---\n", 2)[1])
        assert {name: value for name, value in metadata.items() if name.startswith("license")} == licence
        said = f"the model card names no licence, since {model}/README.md names none; give it with --license ID"
        assert notes == ([] if licence else [said])


def test_a_licence_that_is_no_id_is_rejected() -> None:
    said = refusal(call, "push", ["run", "--repo", "me/demo", "--license", "Apache 2.0"])
    assert said == "--license Apache 2.0: is not an id of the hub, such as apache-2.0 or llama2"


def test_the_card_shows_the_plot(run_folder: Path, tmp_path: Path) -> None:
    text = card(run_folder, tmp_path / "out")
    shown = [token for block in MarkdownIt().parse(text) for token in block.children or () if token.type == "image"]
    assert [token.attrs["src"] for token in shown] == ["loss.png"] and (tmp_path / "out/loss.png").is_file()
    assert shown[0].content == "Training and validation loss over the steps of training"
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (run / "loss.png").unlink()
    assert "loss.png" not in card(run, tmp_path / "without")
    (run / "loss.png").symlink_to(run_folder / "loss.png")
    assert "loss.png" not in card(run, tmp_path / "link") and not (tmp_path / "link/loss.png").exists()


def test_a_base_that_is_not_on_the_hub_is_not_in_the_metadata(run_folder: Path, tmp_path: Path) -> None:
    """The hub takes `base_model` for one of its ids. An adapter outside of a run has neither scores nor settings."""
    shutil.copytree(run_folder / "adapter", tmp_path / "alone")
    text = card(tmp_path / "alone", tmp_path / "out")
    assert "base_model" not in text and "## Scores" not in text and "## Training" not in text


def test_the_hub_is_sent_the_folder(run_folder: Path, tmp_path: Path) -> None:
    with hub_stand_in() as hub:
        done = push(hub, run_folder, "--repo", "me/demo", "--private", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"published: {hub.address}/me/demo")
    assert hub.created["name"] == "demo" and (hub.created.get("private") or hub.created.get("visibility") == "private")
    sent = {str(file.relative_to(tmp_path / "out")): file.read_bytes() for file in (tmp_path / "out").rglob("*.*")}
    assert hub.files == sent and len(sent) == 7


@pytest.mark.parametrize("asked", ["/api/repos/create", "/api/models/me/demo/commit"])
def test_what_the_hub_refuses_is_one_line(run_folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    with hub_stand_in(refuses=asked) as hub:
        for name, value in {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        said = refusal(call, "push", [str(run_folder), "--repo", "me/demo"])
    assert said.startswith("--repo me/demo: the upload failed (") and not hub.files


def test_a_dry_run_asks_the_hub_nothing_and_needs_no_extra(run_folder: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({[*EXTRAS['train'], *EXTRAS['eval']]}));"
    code += "from megatron_tiedlora.commands.front import main; main()"
    words = ("--repo=me/demo", "--base_name=org/base", "--dry_run", f"--output={tmp_path / 'out'}")
    with hub_stand_in() as hub:
        done = push(hub, run_folder, *words, program=("-c", code))
    assert (done.returncode, done.stderr) == (0, "") and not hub.calls
    assert "tiedlora train" in (tmp_path / "out/README.md").read_text()


def test_what_is_no_adapter_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: has no adapter_config\.json"):
        card(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_hub_id("me/demo", flag="--repo", owned=True)
