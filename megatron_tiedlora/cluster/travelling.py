"""Which environment variables of this shell travel to the other hosts of a job, and how; and the words that do.

ssh carries no environment. DeepSpeed's launcher reads a `.deepspeed_env` file and puts `export NAME=VALUE;` before the
command that pdsh gives to each host's shell, with VALUE in double quotes where it holds anything unusual. So secrets
stay here (the words of a command can be read by all users of a host), and values that those quotes do not hold too.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.text_files import read_small_text

PREFIXES = (
    "ACCELERATE_", "CUBLAS_", "CUDA_", "CUDNN_", "DS_", "FI_", "GLOO_", "HF_", "HSA_", "HIP_", "KMP_", "MASTER_",
    "MEGATRON_TIEDLORA_", "MKL_", "MPI4PY_", "NCCL_", "NVIDIA_", "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_", "RCCL_",
    "ROCR_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_", "UCC_", "UCX_",
)  # fmt: skip
NAMES = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "XDG_CACHE_HOME")
# Of this start alone: what the launchers set themselves on each host, or read here.
_NOT = ("DS_ENV_FILE", "MASTER_ADDR", "MASTER_PORT", "PYTHONSTARTUP", "PYTHONINSPECT", "CUDA_VISIBLE_DEVICES")
_SECRET = re.compile(
    r"TOKEN(?!IZER)|SECRET|(?<!BY)(?<!BY_)(?<!COM)PASS(?!_?THR|ES$|IVE)|.PWD$|_PAT$|JWT|CREDENTIAL|API_?KEY"
    r"|ACCESS_?KEY|PRIVATE|_KEY$|KEYS|AUTH"
)
_LOGIN = re.compile(r"://[^/?#\s@]*:[^/?#\s]*@")  # user and password in an address
# What DeepSpeed exports of its own accord, with no look at the values.
DEEPSPEED_EXPORTS = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SPOILED = re.compile(r"[\"$`\\\x00-\x1f\x7f]")
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_UNQUOTED = re.compile(r"[\w@%+=:,./-]*")  # DeepSpeed puts double quotes around any other value


@dataclass(frozen=True)
class Travelling:
    """Variables that travel, and a line for each one that was left behind and why."""

    variables: Mapping[str, str]
    left: tuple[str, ...] = ()

    def file_text(self) -> str:
        """In `.deepspeed_env` form: NAME=VALUE lines and nothing else; a % is doubled, which pdsh undoes."""
        return "".join(f"{name}={value.replace('%', '%%')}\n" for name, value in self.variables.items())


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is nobody else's business."""
    return _SECRET.search(name.upper()) is not None


def travelling(
    environment: Mapping[str, str], *, given: Mapping[str, str] | None = None, in_words: bool = False
) -> Travelling:
    """What of `environment` goes to the other hosts, beside what the user's own `.deepspeed_env` gives.

    Args:
        given: variables that were named by the user, whatever their prefix; they win.
        in_words: whether DeepSpeed puts the values into a shell's command, which not every value survives.
    """
    ours = {name: value for name, value in sorted(environment.items()) if name.startswith(PREFIXES) or name in NAMES}
    chosen = {name: value for name, value in ours.items() if name not in _NOT} | dict(given or {})
    reasons = {name: why_left(name, value, in_words=in_words) for name, value in chosen.items()}
    left = [(name, reason) for name, reason in reasons.items() if reason is not None]
    names = {name for name, _ in left}
    return Travelling(
        {name: value for name, value in chosen.items() if name not in names},
        tuple(f"{name} is not sent to the other hosts: {reason}" for name, reason in left),
    )


def why_left(name: str, value: str, *, in_words: bool = True) -> str | None:
    """Why a variable cannot travel; None where it can.

    Args:
        in_words: whether it is to do so in the words that DeepSpeed gives to a shell.
    """
    if is_secret(name):
        return "its name says that it is a secret; set it there, or log in with `hf auth login`"
    if _LOGIN.search(value):
        return "its value holds an address with a password; set it there"
    if not _NAME.fullmatch(name):
        return "a shell takes no such name"
    if not in_words:
        return None
    if _SPOILED.search(value):
        return "its value holds a quote, $, `, \\ or a line break; set it there"
    if value != value.strip():
        return "its value begins or ends with a blank; set it there"
    return None


def read_user_file(environment: Mapping[str, str]) -> dict[str, str]:
    """The user's own `.deepspeed_env` (or the file that DS_ENV_FILE names), at home and here, the latter wins.

    Blank lines and comments, on which DeepSpeed's launcher would fail, are passed over.

    Raises:
        UserError: the file cannot be read, or a line is not NAME=VALUE.
    """
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[str, str] = {}
    for folder in (Path.home(), Path()):
        file = folder / name
        if not file.is_file():
            continue
        for number, line in enumerate(read_small_text(file).splitlines(), start=1):
            content = line.strip()
            if not content or content.startswith("#"):
                continue
            key, equals, value = content.partition("=")
            if not equals or not _NAME.fullmatch(key.strip()):
                raise UserError(f"{file}:{number}: not of the form NAME=VALUE")
            found[key.strip()] = value.strip()
    return found


def without_bad_exports(environment: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """`environment` without what DeepSpeed would export on its own and must not; and the lines that say so."""
    reasons = {
        name: reason
        for name, value in environment.items()
        if name.startswith(DEEPSPEED_EXPORTS) and (reason := why_left(name, value)) is not None
    }
    kept = {name: value for name, value in environment.items() if name not in reasons}
    return kept, tuple(f"{name} is not sent to the other hosts: {reason}" for name, reason in reasons.items())


def check_unquoted(environment: Mapping[str, str], folder: Path) -> None:
    """Raise UserError for what DeepSpeed would export in double quotes, which nobody removes behind mpirun's -x.

    Args:
        folder: where DeepSpeed is started; it puts this before PYTHONPATH.
    """
    for name, value in {**environment, "PYTHONPATH": f"{folder}:{environment.get('PYTHONPATH', '')}"}.items():
        if name.startswith(DEEPSPEED_EXPORTS) and not _UNQUOTED.fullmatch(value):
            with_folder = ", with the current folder before it," if name == "PYTHONPATH" else ""
            raise UserError(
                f"{name}{with_folder} holds characters around which DeepSpeed puts quotes that the ranks would see;"
                " use --launcher mpirun"
            )


def pdsh_word(word: str) -> str:
    """A word as it must be given to DeepSpeed's pdsh launcher, so that the command on the hosts gets it unharmed.

    pdsh expands %h, %n and %u, and the host's shell all that shells do. DeepSpeed puts a word with a blank into double
    quotes and escapes the double quotes in it, and nothing else; other words it leaves alone.

    Raises:
        UserError: it holds a line break or another control character.
    """
    if re.search(r"[\x00-\x1f\x7f]", word):
        raise UserError(
            f"{word!r}: a line break does not get through pdsh; put the setting into a YAML file of --config"
        )
    word = word.replace("%", "%%")
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return shlex.quote(word)


def check_plain(words: Iterable[tuple[str, str]]) -> None:
    """Raise UserError where one of (what, word) cannot stand unquoted in a shell's command, as DeepSpeed puts it."""
    for what, word in words:
        if not _PLAIN.fullmatch(word) or "%" in word:
            raise UserError(
                f"{what} {word!r} holds characters that DeepSpeed's launcher does not get to other hosts; use a path"
                " of letters, digits and -_.,:+=@/"
            )
