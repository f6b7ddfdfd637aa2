"""Which environment variables are forwarded to a job's other hosts, and how they and command-line arguments are quoted.

ssh forwards no environment. DeepSpeed's launcher reads a `.deepspeed_env` file and puts `export NAME=VALUE;` before the
command that pdsh gives to each host's shell, with VALUE in double quotes if it holds a special character. All users of
a host can read a command's arguments, so secrets are not forwarded; nor are values that those quotes do not protect.
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
# Specific to this start: the launchers set these on each host themselves, or read them here.
_NOT = ("DS_ENV_FILE", "MASTER_ADDR", "MASTER_PORT", "PYTHONSTARTUP", "PYTHONINSPECT", "CUDA_VISIBLE_DEVICES")
_SECRET = re.compile(
    r"TOKEN(?!IZER)|SECRET|(?<!BY)(?<!BY_)(?<!COM)PASS(?!_?THR|ES$|IVE)|.PWD$|_PAT$|JWT|CREDENTIAL|API_?KEY"
    r"|ACCESS_?KEY|PRIVATE|_KEY$|KEYS|AUTH"
)
_LOGIN = re.compile(r"://[^/?#\s@]*:[^/?#\s]*@")  # user and password in an address
# DeepSpeed exports these on its own and does not check their values.
DEEPSPEED_EXPORTS = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SPOILED = re.compile(r"[\"$`\\\x00-\x1f\x7f]")
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_UNQUOTED = re.compile(r"[\w@%+=:,./-]*")  # DeepSpeed puts any other value in double quotes


@dataclass(frozen=True)
class ForwardedEnv:
    """The forwarded variables, and for each one that is not forwarded a line that says why."""

    variables: Mapping[str, str]
    left: tuple[str, ...] = ()

    def file_text(self) -> str:
        """The content of a `.deepspeed_env`: NAME=VALUE lines only; a % is doubled because pdsh halves it."""
        return "".join(f"{name}={value.replace('%', '%%')}\n" for name, value in self.variables.items())


def is_secret(name: str) -> bool:
    """Whether a variable's name suggests that its value is a secret."""
    return _SECRET.search(name.upper()) is not None


def forward_env(
    environment: Mapping[str, str], *, given: Mapping[str, str] | None = None, in_words: bool = False
) -> ForwardedEnv:
    """Choose the variables of `environment` that are forwarded to the other hosts, together with `given`.

    Args:
        given: variables named by the user (in `.deepspeed_env`), whatever their prefix; they take precedence.
        in_words: whether DeepSpeed puts the values into a shell command, which not every value survives.
    """
    ours = {name: value for name, value in sorted(environment.items()) if name.startswith(PREFIXES) or name in NAMES}
    chosen = {name: value for name, value in ours.items() if name not in _NOT} | dict(given or {})
    reasons = {name: why_left(name, value, in_words=in_words) for name, value in chosen.items()}
    left = [(name, reason) for name, reason in reasons.items() if reason is not None]
    names = {name for name, _ in left}
    return ForwardedEnv(
        {name: value for name, value in chosen.items() if name not in names},
        tuple(f"{name} is not sent to the other hosts: {reason}" for name, reason in left),
    )


def why_left(name: str, value: str, *, in_words: bool = True) -> str | None:
    """Why a variable cannot be forwarded; None if it can.

    Args:
        in_words: whether it would be forwarded in a command that DeepSpeed gives to a shell.
    """
    if is_secret(name):
        return "its name looks like a secret's; set it on those hosts, or log in with `hf auth login`"
    if _LOGIN.search(value):
        return "its value holds an address with a password; set it on those hosts"
    if not _NAME.fullmatch(name):
        return "a shell does not accept this name"
    if not in_words:
        return None
    if _SPOILED.search(value):
        return "its value holds a quote, $, `, \\ or a line break; set it on those hosts"
    if value != value.strip():
        return "its value begins or ends with a blank; set it on those hosts"
    return None


def read_user_file(environment: Mapping[str, str]) -> dict[str, str]:
    """Read `.deepspeed_env` (or the file that DS_ENV_FILE names) at home and in the current folder, which overrides.

    Blank lines and comments are skipped; DeepSpeed's launcher would fail on them.

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
                raise UserError(f"{file}:{number}: not of the form NAME=VALUE; correct or remove the line")
            found[key.strip()] = value.strip()
    return found


def without_bad_exports(environment: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """(`environment` without what DeepSpeed would wrongly export on its own, a line for each removed variable)."""
    reasons = {
        name: reason
        for name, value in environment.items()
        if name.startswith(DEEPSPEED_EXPORTS) and (reason := why_left(name, value)) is not None
    }
    kept = {name: value for name, value in environment.items() if name not in reasons}
    return kept, tuple(f"{name} is not sent to the other hosts: {reason}" for name, reason in reasons.items())


def check_unquoted(environment: Mapping[str, str], folder: Path) -> None:
    """Raise UserError for a value that DeepSpeed would put in double quotes, which mpirun's -x does not remove.

    Args:
        folder: where DeepSpeed is started; DeepSpeed prepends it to PYTHONPATH.
    """
    for name, value in {**environment, "PYTHONPATH": f"{folder}:{environment.get('PYTHONPATH', '')}"}.items():
        if name.startswith(DEEPSPEED_EXPORTS) and not _UNQUOTED.fullmatch(value):
            with_folder = ", with the current folder before it," if name == "PYTHONPATH" else ""
            raise UserError(
                f"{name}{with_folder} holds characters for which DeepSpeed adds quotes that the ranks would see;"
                " use --launcher mpirun"
            )


def pdsh_word(word: str) -> str:
    """Quote an argument for DeepSpeed's pdsh launcher so that the command on the hosts gets it unchanged.

    pdsh expands %h, %n and %u, and the host's shell expands its own special characters. DeepSpeed puts an argument with
    a blank into double quotes and escapes only the double quotes in it; it leaves other arguments alone.

    Raises:
        UserError: it holds a line break or another control character.
    """
    if re.search(r"[\x00-\x1f\x7f]", word):
        raise UserError(f"{word!r}: pdsh does not pass on a line break; put the setting into a YAML file for --config")
    word = word.replace("%", "%%")
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return shlex.quote(word)


def check_plain(words: Iterable[tuple[str, str]]) -> None:
    """Raise UserError if one of (what, word) is not safe unquoted in a shell command, as DeepSpeed writes it."""
    for what, word in words:
        if not _PLAIN.fullmatch(word) or "%" in word:
            raise UserError(
                f"{what} {word!r} holds characters that DeepSpeed's launcher cannot send to other hosts; use a path"
                " of letters, digits and -_.,:+=@/"
            )
