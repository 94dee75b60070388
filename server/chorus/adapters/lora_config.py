"""`adapter_config.json` of LoRA and rsLoRA: an allow-list over PEFT's `LoraConfig`.

A field is honoured, or known to change nothing at inference, or must hold what PEFT writes when the feature is off;
anything else is refused by name. Checked against the dataclass of peft 0.21.2; older exports only lack fields.

Defaults are PEFT's: a field that is absent means here what it means there.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, FiniteFloat, Tag, model_validator

from chorus.adapters.strict_json import field_path, quote, validate
from chorus.errors import FailedPrecondition, InvalidArgument

CONFIG_FILE = "adapter_config.json"

_IGNORED = frozenset(
    {
        # Where the adapter comes from; nothing is imported or fetched by these names.
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
        # The memory layout of the base's weight, not of A and B.
        "fan_in_fan_out",
        # Training only.
        "lora_dropout",
        "megatron_core",
        "runtime_config",
        # How A and B began; `init_lora_weights` says whether the base was changed with them.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        # Read only with `use_qalora`, which is refused.
        "qalora_group_size",
    }
)
_HINTS = {
    "alora_invocation_tokens": "activated LoRA is not supported",
    "auto_map": "code from an adapter is never run",
    "kasa_config": "KaSA is not supported",
    "layer_replication": "the base's layers can not be replicated",
    "lora_bias": "LoRA with a bias is not supported yet",
    "modules_to_save": "fully trained modules are not supported yet",
    "target_parameters": "LoRA on bare parameters is not supported",
    "trainable_token_indices": "trained token rows are not supported yet",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_dora": "DoRA is not supported yet",
    "use_qalora": "QALoRA is not supported",
}
_INERT_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})

Name = Annotated[str, Field(max_length=512)]
Names = Annotated[
    tuple[Name, ...],
    Field(max_length=8192),
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]
Regex = Annotated[str, Field(max_length=4096)]
Modules = Annotated[
    Annotated[Names, Tag("names")] | Annotated[Regex, Tag("regex")],
    Discriminator(lambda value: "regex" if isinstance(value, str) else "names"),
]
Layer = Annotated[int, Field(ge=0, lt=1 << 31)]
Rank = Annotated[int, Field(ge=1, lt=1 << 31)]
Alpha = Annotated[FiniteFloat, Field(ge=-1e30, le=1e30)]


class LoraConfig(BaseModel):
    """What a LoRA adapter says about itself, as far as it matters for serving.

    `layers_to_transform` is None where every layer counts. The patterns keep the file's order: the first match wins.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: Literal["LORA"]
    target_modules: Modules
    exclude_modules: Modules | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8.0
    use_rslora: bool = False
    rank_pattern: Annotated[dict[Name, Rank], Field(max_length=8192)] = {}
    alpha_pattern: Annotated[dict[Name, Alpha], Field(max_length=8192)] = {}
    layers_to_transform: tuple[Layer, ...] | None = None
    layers_pattern: tuple[Annotated[str, Field(max_length=256, pattern=r"\A[A-Za-z0-9_.]+\z")], ...] = ()
    bias: Literal["none"] = "none"
    init_lora_weights: bool | str = True
    lora_dropout: FiniteFloat = 0.0
    fan_in_fan_out: bool = False
    inference_mode: bool = False

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Reads the parsed JSON of a config whose `peft_type` is LORA.

        Raises:
            InvalidArgument: a wrong type or value.
            FailedPrecondition: UNSUPPORTED_FIELD, naming the field and its value.
        """
        for field, value in raw.items():
            if field not in cls.model_fields and field not in _IGNORED and not _is_off(value):
                raise _unsupported(field, value, _HINTS.get(field))
        _refuse_unservable(raw)
        return validate(cls, _normalised(raw), CONFIG_FILE)

    @model_validator(mode="after")
    def _layers_need_names(self) -> Self:
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern can not be used when target_modules is a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        return self

    def identity(self) -> dict[str, Any]:
        """The fields that decide what the adapter computes, as JSON: the config's part of the version digest."""
        return {
            "peft_type": self.peft_type,
            "target_modules": _unordered(self.target_modules),
            "exclude_modules": _unordered(self.exclude_modules or ()),
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            "rank_pattern": list(self.rank_pattern.items()),
            "alpha_pattern": list(self.alpha_pattern.items()),
            "layers_to_transform": sorted(set(self.layers_to_transform or ())),
            "layers_pattern": list(self.layers_pattern),
        }


def parse_config(raw: Mapping[str, Any]) -> LoraConfig:
    """Reads a parsed `adapter_config.json` of any kind that is served: LORA.

    Raises:
        InvalidArgument: malformed.
        FailedPrecondition: UNSUPPORTED_KIND or UNSUPPORTED_FIELD.
    """
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        raise InvalidArgument(f"{CONFIG_FILE}: peft_type must be a string", reason="INVALID_FIELD", field="peft_type")
    if kind != "LORA":
        raise FailedPrecondition(
            f"peft_type {quote(kind)} is not supported; LORA is", reason="UNSUPPORTED_KIND", field="peft_type"
        )
    return LoraConfig.parse(raw)


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _refuse_unservable(raw: Mapping[str, Any]) -> None:
    """Values that PEFT understands in fields that are honoured only in part."""
    if raw.get("target_modules") is None:
        raise _unsupported(
            "target_modules", None, "name the modules: PEFT's defaults per model type are not known here"
        )
    if raw.get("bias") in ("all", "lora_only"):
        raise _unsupported("bias", raw["bias"], "trained biases are not supported yet")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _INERT_INITS:
        hint = "it changes the base; convert to plain LoRA with path_initial_model_for_weight_conversion"
        raise _unsupported("init_lora_weights", init, hint)
    patterns = raw.get("layers_pattern")
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        if isinstance(pattern, str) and not all(
            char.isascii() and (char.isalnum() or char in "._") for char in pattern
        ):
            raise _unsupported("layers_pattern", pattern, "only plain names of layer lists are supported")


def _unsupported(field: str, value: Any, hint: str | None) -> FailedPrecondition:
    message = f"{CONFIG_FILE}: {field_path(field)} = {quote(value)} is not supported"
    return FailedPrecondition(
        f"{message}: {hint}" if hint else message, reason="UNSUPPORTED_FIELD", field=field_path(field)
    )


def _normalised(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling for each meaning: single values as lists, null and empty as absent, as PEFT treats them."""
    result = {key: value for key, value in raw.items() if value is not None or key in ("r", "lora_alpha")}
    layers = result.pop("layers_to_transform", None)
    if layers is not None and layers != []:
        result["layers_to_transform"] = tuple(layers) if isinstance(layers, list) else (layers,)
    pattern = result.pop("layers_pattern", None)
    if pattern:
        result["layers_pattern"] = tuple(pattern) if isinstance(pattern, list) else (pattern,)
    return result


def _unordered(modules: tuple[str, ...] | str) -> list[str] | str:
    return modules if isinstance(modules, str) else sorted(set(modules))
