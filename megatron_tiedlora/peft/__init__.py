"""Register Tied-LoRA as a method of PEFT. After this module is imported, PEFT's own functions can use the method:

    import megatron_tiedlora.peft
    model = PeftModel.from_pretrained(base, "RUN/adapter")

Adapters of this method are native adapter folders, and their state dict has the tensors A, B, u and v.

PEFT's `register_peft_method` accepts only names in the enumeration `PeftType`, so the name is first added there. In
native folders the key of the rank is `rank`, not `r`. So PEFT's reader of `adapter_config.json` is wrapped to read
native folders as this package does. Other folders are read as before. Both changes can be removed when PEFT includes
the method or allows packages to add names.
"""

from pathlib import Path
from typing import Any

from megatron_tiedlora.checkpoint.native_adapter import PEFT_TYPE

_NEEDED = "_remap_adapter_state_dict_for_load"  # a method of PEFT's tuners that renames the tensors it loads
_FIRST_RELEASE = "0.21"  # the first PEFT version with this method


def register() -> None:
    """Register the method once. Raise ImportError if PEFT is missing, too old, or does not allow the registration."""
    try:
        import peft
        from peft.tuners.tuners_utils import BaseTuner
    except ModuleNotFoundError as error:
        raise ImportError(
            f"megatron_tiedlora.peft needs PEFT ({error}); run `pip install 'peft>={_FIRST_RELEASE}'`"
        ) from None
    if not hasattr(BaseTuner, _NEEDED):
        raise ImportError(
            f"megatron_tiedlora.peft needs PEFT {_FIRST_RELEASE} or later, and this is {peft.__version__}; run `pip"
            " install -U peft`, or load an export (tiedlora export), which works with every version of PEFT"
        )
    known: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    if registered := known.get(PEFT_TYPE):
        if registered.__module__.startswith("peft."):
            raise ImportError(
                f"megatron_tiedlora.peft: PEFT {peft.__version__} has a method {PEFT_TYPE} of its own that cannot read"
                " native adapters; load an export (tiedlora export) instead"
            )
        return
    _add_type(peft.PeftType, PEFT_TYPE, version=peft.__version__)
    from megatron_tiedlora.peft.method import TiedLoraConfig, TiedLoraModel

    name = PEFT_TYPE.lower()
    peft.utils.register_peft_method(
        name=name, config_cls=TiedLoraConfig, model_cls=TiedLoraModel, prefix=TiedLoraModel.prefix
    )
    _read_native_folders(peft.config.PeftConfigMixin)


def _add_type(kind: Any, name: str, *, version: str) -> None:
    """Add `name` to PEFT's enumeration of types. Raise ImportError if PEFT does not accept the added name."""
    if name in kind.__members__:
        return
    try:
        member = str.__new__(kind, name)
        member._name_ = member._value_ = name
        setattr(kind, name, member)
        kind._member_names_.append(name)
        kind._member_map_[name] = kind._value2member_map_[name] = member
        is_member = kind(name) is kind[name] is getattr(kind, name) and name in list(kind)
    except (AttributeError, TypeError, ValueError, KeyError):
        is_member = False
    if not is_member:
        raise ImportError(
            f"megatron_tiedlora.peft: PEFT {version} does not allow a type of another package ({name});"
            " load an export (tiedlora export) instead"
        )


def _read_native_folders(mixin: Any) -> None:
    """Wrap PEFT's reader of `adapter_config.json`, so that PEFT can also read native folders."""
    from megatron_tiedlora.peft.method import native_arguments

    read = mixin.from_json_file.__func__

    def from_json_file(cls: Any, path_json_file: str, **keywords: Any) -> dict[str, Any]:
        content: dict[str, Any] = read(cls, path_json_file, **keywords)
        is_native = "format_version" in content and content.get("peft_type", PEFT_TYPE) == PEFT_TYPE
        return native_arguments(Path(path_json_file).parent) if is_native else content

    from_json_file.__doc__ = read.__doc__
    mixin.from_json_file = classmethod(from_json_file)


register()

# PEFT must know the type first.
from megatron_tiedlora.peft.method import TiedLoraConfig, TiedLoraLinear, TiedLoraModel  # noqa: E402

__all__ = ["TiedLoraConfig", "TiedLoraLinear", "TiedLoraModel"]
