"""`chorus adapters show`: all that operators can learn of one adapter, in one place."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from chorus.cli.output import mebibytes

if TYPE_CHECKING:
    from chorus.client import AdapterVersion, Client


def facts(client: "Client", name: str) -> dict[str, Any]:
    """Gives the adapter's fields with `versions`, newest first, each with its `aliases` and `residency` (or None)."""
    adapter = client.get_adapter(name)
    resident = {version.digest: asdict(version) for version in client.residency().versions}

    def described(version: "AdapterVersion") -> dict[str, Any]:
        aliases = [alias for alias, digest in adapter.aliases.items() if digest == version.digest]
        return asdict(version) | {"aliases": aliases, "residency": resident.get(version.digest)}

    versions = sorted(client.versions(name), key=lambda version: version.create_time, reverse=True)
    return asdict(adapter) | {"versions": [described(version) for version in versions]}


def print_facts(adapter: dict[str, Any]) -> None:
    """Writes them for people on stdout."""
    rows: list[tuple[str, object]] = [
        ("adapter", adapter["name"]),
        ("aliases", ", ".join(f"{alias} -> {digest[:12]}" for alias, digest in adapter["aliases"].items()) or "none"),
        ("created", f"{adapter['create_time']:%Y-%m-%d %H:%M}"),
        ("updated", f"{adapter['update_time']:%Y-%m-%d %H:%M}"),
    ]
    _print(rows, indent="")
    for version in adapter["versions"]:
        named = f"  ({', '.join(version['aliases'])})" if version["aliases"] else ""
        print(f"\n{version['digest']}{named}")
        _print(_version_rows(version), indent="  ")


def _version_rows(version: dict[str, Any]) -> list[tuple[str, object]]:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in version["metrics"].items())
    return [
        ("config", _config(version)),
        ("size", mebibytes(version["size_bytes"])),
        ("task", version["task"] or "not said"),
        ("metrics", metrics or "none"),
        ("template", "its own" if version["has_chat_template"] else "the base's"),
        ("memory", _place(version["residency"])),
        ("pinned", "yes" if version["pinned"] else "no"),
        ("created", f"{version['create_time']:%Y-%m-%d %H:%M}"),
    ]


def _config(version: dict[str, Any]) -> str:
    alpha = f", alpha {version['alpha']:g}" if version["alpha"] else ""
    names = f": {', '.join(version['target_modules'])}" if version["target_modules"] else ""
    return f"{version['kind']}, rank {version['max_rank']}{alpha}, on {version['site_count']} modules{names}"


def _place(residency: dict[str, Any] | None) -> str:
    if residency is None:
        return "not loaded"
    return f"{residency['tier']}, {residency['refs']} requests running, {residency['hits']} served since it was loaded"


def _print(rows: list[tuple[str, object]], *, indent: str) -> None:
    for name, value in rows:
        print(f"{indent}{name:<10}{value}")
