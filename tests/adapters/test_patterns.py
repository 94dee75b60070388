"""Bounded matching against Python's `re`, and against patterns that `re` would never finish."""

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chorus.adapters.patterns import Budget, Pattern
from chorus.errors import FailedPrecondition, InvalidArgument


def pattern(source: str) -> Pattern:
    return Pattern(source, "target_modules", Budget())


ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        r"\D",
        r"\w",
        r"\W",
        r"\s",
        "[ab]",
        "[^a]",
        "[a-c1]",
        r"[^\d.]",
        r"\b",
        r"\B",
        "^",
        "$",
        r"\A",
        r"\Z",
        "(?=a)",
        "(?!b)",
        "(?<=a)",
        "(?<!ab)",
        "(?:)",
        "1",
        "_",
    ]
)


def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.tuples(st.sampled_from(["(", "(?:", "(?=", "(?!"]), inner).map(lambda parts: f"{parts[0]}{parts[1]})")
    quantifier = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "*?", "+?", "??", "{2,}"])
    repeated = st.tuples(inner, quantifier).map(lambda parts: f"(?:{parts[0]}){parts[1]}")
    joined = st.lists(inner, min_size=2, max_size=4)
    return group | repeated | joined.map("".join) | joined.map("|".join)


PATTERNS = st.recursive(ATOMS, grow, max_leaves=8)
# CPython 3.14 changed what \B says about the empty string; module names are never empty.
NAMES = st.text("ab1._", min_size=1, max_size=8)


@settings(max_examples=800, deadline=None)
@given(source=PATTERNS, name=NAMES)
def test_matches_exactly_what_re_matches(source: str, name: str) -> None:
    try:
        compiled = re.compile(source)
    except re.error:
        with pytest.raises(InvalidArgument):
            pattern(source)
        return
    assert pattern(source).fullmatch(name) == bool(compiled.fullmatch(name))
    assert pattern(source).match(name) == bool(compiled.match(name))


REAL = [
    r".*\.(q_proj|k_proj|v_proj)",
    r"model\.layers\.(?:[0-9]|1[0-5])\.self_attn\.[qv]_proj",
    r"^(?!.*visual).*(?:q_proj|v_proj).*",
    r"^(model\.layers(?=\.).*\.(q_proj|down_proj))$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:k_proj|v_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|up_proj)))",
    r".*(?<!vision_tower)\.q_proj",
    r"[^.]+\.layers\.\d+\.mlp\.(?:gate|up)_proj",
    r"transformer\.h\.\d+\.attn\.c_attn",
]


@pytest.mark.parametrize("source", REAL)
def test_patterns_of_real_exports_match_as_re(source: str) -> None:
    for layer in (0, 3, 15, 27):
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm"):
            for prefix in ("model.layers", "model.visual.layers", "language_model.layers", "vision_tower"):
                name = f"{prefix}.{layer}.{module}"
                assert pattern(source).fullmatch(name) == bool(re.fullmatch(source, name)), name


CATASTROPHES = [
    r"(a*)*b",
    r"(a|a)*b",
    r"(a|aa)+$b",
    ".*" * 200 + "b",
    r"((a+)+)+b",
    r"(?:a?){60}a{60}b",
    r"(a*)*" * 40 + "b",
]


@pytest.mark.parametrize("source", CATASTROPHES)
def test_catastrophic_pattern_ends_quickly(source: str) -> None:
    matching = pattern(source)
    start = time.thread_time()
    assert not matching.fullmatch("a" * 60)
    assert time.thread_time() - start < 1


@pytest.mark.parametrize("source", ["(?:){4294967294}b", "(?:(?:(?:(?=a*)){9999}){9999}){9999}b"])
def test_pattern_over_the_budget_is_refused(source: str) -> None:
    matching = Pattern(source, "exclude_modules", Budget(100_000))
    with pytest.raises(FailedPrecondition, match="exclude_modules: matching its patterns takes too long") as caught:
        matching.fullmatch("a" * 60)
    assert caught.value.reason == "PATTERN_TOO_COSTLY"


def test_budget_is_shared_by_all_patterns_of_an_adapter() -> None:
    budget = Budget(450)
    patterns = [Pattern(".*b", "target_modules", budget) for _ in range(10)]
    patterns[0].fullmatch("a" * 30)
    with pytest.raises(FailedPrecondition):
        [one.fullmatch("a" * 30) for one in patterns]


@pytest.mark.parametrize(
    "source", [r"(a)\1", "(?>a*)b", "a*+b", "(a)?(?(1)b|c)", "(?i)a", "(?i:a)", "(" * 60 + ")" * 60]
)
def test_construct_that_is_not_matched_is_refused(source: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        pattern(source)
    assert caught.value.reason == "UNSUPPORTED_PATTERN"


@pytest.mark.parametrize(
    "source", ["(", "*", "[", "(?P<a", "a{99999999999999999999}", "(?<=a*)b", "(" * 1500 + ")" * 1500, "a" * 5000]
)
def test_what_is_no_pattern_is_invalid(source: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        pattern(source)
    assert len(caught.value.message) < 300


@given(name=st.text("a.", max_size=30))
def test_newline_and_unicode_names_are_as_in_re(name: str) -> None:
    for source in (".*", r"\w+$", r".*\n", "[^a]*"):
        for changed in (name + "\n", name + "é", "\n" + name):
            assume(changed)
            assert pattern(source).fullmatch(changed) == bool(re.fullmatch(source, changed))
