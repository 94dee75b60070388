"""LoRA on a base: peft injects it, we check that it landed where it was asked for."""

import re
import warnings

from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chorus.errors import InvalidArgument
from chorus.trainer.config import LoraSettings

FIELD = "lora.target_modules"


def attach_lora(base: PreTrainedModel, settings: LoraSettings) -> PeftModelForCausalLM:
    """Injects LoRA layers into `base` (in place) and returns the model that trains them; A is random, B is 0.

    Draws from torch's global generator.

    Raises:
        InvalidArgument: a target that names nothing, or something that is no linear layer.
    """
    targets = settings.target_modules
    _check_targets(base, targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=settings.rslora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    with warnings.catch_warnings():
        # peft reads a name that transformers 5.23 renamed; corrects fan_in_fan_out for the one nn.Linear of GPT-2; and
        # warns of tied weights when lm_head is a target, which matters for merging only.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True but", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True", category=UserWarning)
        try:
            model = get_peft_model(base, config)
        except ValueError as error:
            raise _refusal(str(error).splitlines()[0]) from None
    assert isinstance(model, PeftModelForCausalLM)
    return model


def _check_targets(base: PreTrainedModel, targets: str | tuple[str, ...]) -> None:
    """peft ignores a list entry that matches nothing as long as another one matches; we refuse it."""
    if targets == "all-linear":
        return
    modules = dict(base.named_modules())
    for target in (targets,) if isinstance(targets, str) else targets:
        found = [name for name in modules if _matches(name, target, is_pattern=isinstance(targets, str))]
        if not found:
            raise _refusal(f"{target!r} matches no module of the base")
        for name in found:
            if not isinstance(modules[name], nn.Linear | Conv1D):
                raise _refusal(f"{target!r} matches {name}, which is no linear layer")


def _matches(name: str, target: str, *, is_pattern: bool) -> bool:
    """As peft matches: a string is a full-match pattern, a list entry is a name or the end of one."""
    return bool(re.fullmatch(target, name)) if is_pattern else name == target or name.endswith(f".{target}")


def _refusal(what: str) -> InvalidArgument:
    return InvalidArgument(f"{FIELD}: {what}", reason="BAD_TARGETS", field=FIELD)
