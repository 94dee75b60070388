import pytest

from chorus.client import expand

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("acme/support", "tenants/acme/adapters/support"),
        ("acme/support@canary", "tenants/acme/adapters/support@canary"),
        (f"acme/support/versions/{DIGEST}", f"tenants/acme/adapters/support/versions/{DIGEST}"),
        # A tenant may be called `tenants`.
        ("tenants/support", "tenants/tenants/adapters/support"),
    ],
)
def test_short_names_expand(short: str, full: str) -> None:
    assert expand(short) == full


@pytest.mark.parametrize(
    "name",
    [
        "",
        "support",
        "tenants/acme/adapters/support",
        "tenants/acme/adapters/support@canary",
        f"tenants/acme/adapters/support/versions/{DIGEST}",
        "a/b/c",
        "/",
        "../..@x/y",
    ],
)
def test_everything_else_is_left_for_the_server_to_judge(name: str) -> None:
    assert expand(name) == name


@pytest.mark.parametrize("name", ["acme/support", "acme/support@live", f"acme/support/versions/{DIGEST}"])
def test_expanding_twice_changes_nothing(name: str) -> None:
    assert expand(expand(name)) == expand(name)
