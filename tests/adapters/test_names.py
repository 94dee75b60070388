"""Resource names: three forms in, nothing else, and bad input is neither echoed nor costly."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.adapters.names import (
    ID_PATTERN,
    AdapterName,
    check_digest,
    check_id,
    parse_adapter_name,
    parse_name,
    parse_tenant_name,
    parse_version_name,
)
from chorus.errors import InvalidArgument

D = "0123456789abcdef" * 4
IDS = st.from_regex(rf"\A{ID_PATTERN}\Z", fullmatch=True)
NAMES = st.builds(AdapterName, IDS, IDS) | st.builds(AdapterName, IDS, IDS, alias=IDS)
NAMES |= st.builds(AdapterName, IDS, IDS, digest=st.text("0123456789abcdef", min_size=64, max_size=64))


@given(name=NAMES)
def test_formatted_name_parses_back(name: AdapterName) -> None:
    assert parse_name(str(name)) == name


def test_the_three_forms() -> None:
    assert parse_name("tenants/t/adapters/a") == AdapterName("t", "a")
    assert parse_name("tenants/t/adapters/a@canary") == AdapterName("t", "a", alias="canary")
    assert parse_name(f"tenants/t/adapters/a/versions/{D}") == AdapterName("t", "a", digest=D)
    assert str(parse_name("tenants/t/adapters/a@canary").version(D)) == f"tenants/t/adapters/a/versions/{D}"
    assert parse_name("tenants/t/adapters/a@canary").bare == AdapterName("t", "a")


BAD = [
    "",
    "a",
    "tenants/t",
    "tenants/t/adapters/",
    "tenants//adapters/a",
    "tenants/t/adapters/a/",
    "tenants/t/adapters/a@",
    f"tenants/t/adapters/a@x/versions/{D}",
    "tenants/t/adapters/a/versions/",
    f"tenants/t/adapters/a/versions/{D.upper()}",
    f"tenants/t/adapters/a/versions/{D}0",
    f"tenants/t/adapters/a/versions/{D[1:]}",
    "tenants/T/adapters/a",
    "tenants/-t/adapters/a",
    "tenants/t-/adapters/a",
    "tenants/t/adapters/a\n",
    "tenants/t/adapters/a\0",
    "tenants/../adapters/a",
    "tenants/t/adapters/../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "tenants/t/adapters/а",  # noqa: RUF001  a Cyrillic a
    "tenants/t/adapters/\u0661",
    "tenants/t/adapters/" + "a" * 64,
    "tenants/t/adapters/\ud800",
    "x" * 10_000,
    "tenants/" + "a/" * 5_000,
]


@pytest.mark.parametrize("text", BAD, ids=lambda text: ascii(text)[:40])
def test_anything_else_is_refused_with_the_fields_path(text: str) -> None:
    for parse in (parse_name, parse_adapter_name, parse_version_name):
        with pytest.raises(InvalidArgument) as caught:
            parse(text, "adapter")
        assert caught.value.violations[0].field == "adapter"
        assert caught.value.message.isascii()
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 280


def test_forms_where_only_one_will_do() -> None:
    for text in ("tenants/t/adapters/a@live", f"tenants/t/adapters/a/versions/{D}"):
        with pytest.raises(InvalidArgument):
            parse_adapter_name(text)
    for text in ("tenants/t/adapters/a@live", "tenants/t/adapters/a"):
        with pytest.raises(InvalidArgument):
            parse_version_name(text)


def test_longest_name_passes() -> None:
    longest = "a" * 63
    assert parse_name(f"tenants/{longest}/adapters/{longest}/versions/{D}").tenant == longest


def test_tenant_names() -> None:
    assert parse_tenant_name("tenants/acme") == "acme"
    for bad in ("acme", "tenants/", "tenants/a/b", "tenants/-", "tenants/" + "a" * 64, "tenants/a\0", "y" * 10_000):
        with pytest.raises(InvalidArgument):
            parse_tenant_name(bad)


def test_ids_and_digests() -> None:
    assert check_id("live", "alias") == "live"
    assert check_digest(D) == D
    for bad in ("", "A", "a" * 64, "a_b", "é", "a\n", "a" * 100_000):
        with pytest.raises(InvalidArgument):
            check_id(bad, "alias")
    for bad in ("", D[1:], D + "0", D.upper(), "g" * 64, "../" + D[3:]):
        with pytest.raises(InvalidArgument):
            check_digest(bad)


def test_long_input_is_cheap() -> None:
    start = time.thread_time()
    for _ in range(1000):
        with pytest.raises(InvalidArgument):
            parse_name("tenants/" + "a-" * 5000)
    assert time.thread_time() - start < 1
