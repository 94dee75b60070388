"""Which modules a LoRA config targets, and with which rank and alpha: PEFT's rules over module names.

The oracle is peft's `check_target_module_exists`, `get_pattern_key` and `_maybe_include_all_linear_layers` (0.21).
Knows configs, names and `Site`s; no tensors.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from chorus.adapters.lora_config import LoraConfig
from chorus.adapters.patterns import Budget, Pattern, PlainPattern
from chorus.models.sites import Site

ALL_LINEAR = "all-linear"

V = TypeVar("V", int, float)


class Targets:
    """A config's choices over one base's sites, its patterns compiled once.

    `target_modules: "all-linear"` means every linear but the lm_head.
    """

    def __init__(self, config: LoraConfig, sites: Iterable[Site]) -> None:
        budget = Budget()
        self._config = config
        modules: Iterable[str] | str = config.target_modules
        if isinstance(modules, str) and modules.lower() == ALL_LINEAR:
            modules = [site.name for site in sites if not (site.is_lm_head or site.is_embedding)]
        self._chosen = _Choice(modules, "target_modules", budget)
        self._excluded = _Choice(config.exclude_modules or [], "exclude_modules", budget)
        self._layer_patterns = _layer_patterns(config)
        self._ranks = _Patterns(config.rank_pattern, "rank_pattern", budget)
        self._alphas = _Patterns(config.alpha_pattern, "alpha_pattern", budget)

    def matches(self, name: str) -> bool:
        """Whether the module of this name is adapted."""
        if self._excluded.exactly(name) or self._excluded.loosely(name):
            return False
        # An entry that is the whole name wins over layers_to_transform: peft does it so.
        return self._chosen.exactly(name) or (self._chosen.loosely(name) and self._in_layers(name))

    def rank(self, name: str) -> int:
        """The rank at a module: the first matching `rank_pattern`, else `r`."""
        return self._ranks.first(name, self._config.r)

    def scale(self, name: str) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA, both as patterned."""
        alpha = self._alphas.first(name, self._config.lora_alpha)
        rank = self.rank(name)
        return alpha / (math.sqrt(rank) if self._config.use_rslora else rank)

    def _in_layers(self, name: str) -> bool:
        layers = self._config.layers_to_transform
        if layers is None:
            return True
        for pattern in self._layer_patterns:
            if found := pattern.match(name):
                return int(found["idx"]) in layers
        return False


class _Choice:
    """`target_modules` or `exclude_modules`: a list of names and suffixes, or one regular expression."""

    def __init__(self, modules: Iterable[str] | str, field: str, budget: Budget) -> None:
        self._pattern = Pattern(modules, field, budget) if isinstance(modules, str) else None
        names = () if isinstance(modules, str) else tuple(modules)
        self._names = frozenset(names)
        self._suffixes = tuple(f".{name}" for name in names)

    def exactly(self, name: str) -> bool:
        return self._pattern.fullmatch(name) if self._pattern else name in self._names

    def loosely(self, name: str) -> bool:
        return name.endswith(self._suffixes)


class _Patterns(Generic[V]):
    """`rank_pattern` or `alpha_pattern`: the first key, in the file's order, that matches a whole dotted suffix."""

    def __init__(self, values: Mapping[str, V], field: str, budget: Budget) -> None:
        self._values: list[tuple[Pattern | PlainPattern, V]] = [
            (_compile_key(key, field, budget), value) for key, value in values.items()
        ]

    def first(self, name: str, default: V) -> V:
        return next((value for pattern, value in self._values if pattern.match(name)), default)


def _compile_key(key: str, field: str, budget: Budget) -> Pattern | PlainPattern:
    template = rf"(.*\.)?({key})$"
    if re.fullmatch(r"(?:\w|\.|\\\.|\^)*", key, re.ASCII):  # plain names, as most are: `re` takes linear time
        return PlainPattern(template, field, budget)
    return Pattern(template, field, budget)


def _layer_patterns(config: LoraConfig) -> list[re.Pattern[str]]:
    """How the number of a module's layer is found: the first numbered segment, or the one after a named list.

    `LoraConfig` allows only word characters and dots in `layers_pattern`, so these can not backtrack far.
    """
    if not config.layers_pattern:
        return [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
    return [re.compile(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.") for pattern in config.layers_pattern]
