"""`chorus adapters`: what operators do with adapters, over the admin port."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chorus.cli.digests import whole_digest, whole_name
from chorus.cli.lazy import new_app
from chorus.cli.options import DEFAULT_ADMIN, JsonOption
from chorus.cli.output import mebibytes, print_json, print_table, progress_bar, short
from chorus.cli.suggest import adapter_suggestions

if TYPE_CHECKING:
    from chorus.client import AdapterVersion, Client, ResidentVersion

app = new_app(
    no_args_is_help=True,
    help="Publish adapters and look after them.",
    epilog="""[bold]Examples[/bold]

  chorus adapters push ./my-adapter --tenant acme --name support --alias canary

  chorus adapters show acme/support

  chorus adapters alias acme/support live 3f9a1c22   [dim]# also how to roll back[/dim]""",
)


def example(*calls: str) -> str:
    """Gives the end of a subcommand's help."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  chorus adapters {call}" for call in calls)])


AdminOption = Annotated[str, typer.Option("--admin", metavar="HOST:PORT", help="The server's admin port.")]
AdapterArgument = Annotated[str, typer.Argument(metavar="NAME", help="tenants/T/adapters/A, or T/A for short.")]
VersionArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="tenants/T/adapters/A/versions/DIGEST, or T/A/versions/DIGEST for short.")
]


@app.command(
    epilog=example(
        "push ./my-adapter --tenant acme --name support",
        "push ./my-adapter --tenant acme --name support --alias canary",
    )
)
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that PEFT saved.", exists=True, file_okay=False)
    ],
    *,
    tenant: Annotated[str, typer.Option(help="Whose adapter it is.")],
    name: Annotated[str, typer.Option(help="The adapter's name; created if new.")],
    admin: AdminOption = DEFAULT_ADMIN,
    alias: Annotated[str | None, typer.Option(help="The alias to move to it; live if not given.")] = None,
    no_alias: Annotated[bool, typer.Option("--no-alias", help="Store the version and move no alias.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload an adapter as a new version, and let calls go to it."""
    if no_alias and alias is not None:
        raise typer.BadParameter("goes without --alias", param_hint="'--no-alias'")
    target = None if no_alias else alias or "live"
    with _client(admin) as client, progress_bar(f"{tenant}/{name}") as on_progress:
        pushed = client.push(folder, tenant=tenant, name=name, alias=target, on_progress=on_progress)
    if as_json:
        print_json(pushed)
    else:
        print(pushed.version)
        print(
            f"{'stored' if pushed.created else 'already there'}: {pushed.kind}, rank {pushed.max_rank}, "
            f"{mebibytes(pushed.size_bytes)}; {_aliases(pushed.aliases)}"
        )


@app.command("list", epilog=example("list", "list --tenant acme --json"))
def list_adapters(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
) -> None:
    """List adapters."""
    with _client(admin) as client:
        adapters = client.list_adapters(tenant)
    if as_json:
        print_json({"adapters": [asdict(adapter) for adapter in adapters]})
    else:
        print_table(
            ("adapter", "versions", "aliases", "updated"),
            [(a.name, a.version_count, _aliases(a.aliases), _minute(a.update_time)) for a in adapters],
            empty="no adapters",
        )


@app.command(epilog=example("show acme/support"))
def show(name: AdapterArgument, admin: AdminOption = DEFAULT_ADMIN, as_json: JsonOption = False) -> None:
    """Show an adapter: aliases, and each version's config, size, metrics and place in memory."""
    from chorus.cli.show import facts, print_facts

    with _client(admin) as client, adapter_suggestions(name, client.list_adapters):
        found = facts(client, name)
    if as_json:
        print_json(found)
    else:
        print_facts(found)


@app.command(epilog=example("versions acme/support"))
def versions(name: AdapterArgument, admin: AdminOption = DEFAULT_ADMIN, as_json: JsonOption = False) -> None:
    """List an adapter's versions."""
    with _client(admin) as client, adapter_suggestions(name, client.list_adapters):
        found = client.versions(name)
    if as_json:
        print_json({"versions": [asdict(version) for version in found]})
    else:
        _print_versions(found)


@app.command(epilog=example("alias acme/support live 3f9a1c22", 'alias acme/support canary ""'))
def alias(
    name: AdapterArgument,
    alias: Annotated[str, typer.Argument(help="For example live or canary.")],
    digest: Annotated[
        str, typer.Argument(help='The version to point at, or how its digest begins; "" removes the alias.')
    ],
    *,
    etag: Annotated[str, typer.Option(help="Refuse if the adapter has changed since this etag.")] = "",
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version: roll out, or roll back."""
    with _client(admin) as client, adapter_suggestions(name, client.list_adapters):
        adapter = client.set_alias(name, alias, whole_digest(client, name, digest), etag=etag)
    if as_json:
        print_json(adapter)
    else:
        print(f"{adapter.name}: {_aliases(adapter.aliases)}")


@app.command(epilog=example("delete acme/support/versions/3f9a1c22", "delete acme/support"))
def delete(
    name: Annotated[str, typer.Argument(help="An adapter with all its versions, or one version.")],
    admin: AdminOption = DEFAULT_ADMIN,
    as_json: JsonOption = False,
) -> None:
    """Delete an adapter or one version. Streams under way finish."""
    from chorus.client import expand

    with _client(admin) as client, adapter_suggestions(name, client.list_adapters):
        name = whole_name(client, name)
        client.delete(name)
    if as_json:
        print_json({"deleted": expand(name)})
    else:
        print(f"deleted {expand(name)}")


@app.command(epilog=example("pin acme/support/versions/3f9a1c22"))
def pin(name: VersionArgument, admin: AdminOption = DEFAULT_ADMIN, as_json: JsonOption = False) -> None:
    """Keep a version on the device."""
    with _client(admin) as client, adapter_suggestions(name, client.list_adapters):
        version = client.pin(whole_name(client, name))
    if as_json:
        print_json(version)
    else:
        _print_versions([version])


@app.command(epilog=example("unpin acme/support/versions/3f9a1c22"))
def unpin(name: VersionArgument, admin: AdminOption = DEFAULT_ADMIN, as_json: JsonOption = False) -> None:
    """Let a version be evicted again."""
    with _client(admin) as client, adapter_suggestions(name, client.list_adapters):
        version = client.unpin(whole_name(client, name))
    if as_json:
        print_json(version)
    else:
        _print_versions([version])


@app.command(epilog=example("residency", "residency --json"))
def residency(admin: AdminOption = DEFAULT_ADMIN, as_json: JsonOption = False) -> None:
    """Show what is in memory, where, and how much of the budget it takes."""
    with _client(admin) as client:
        found = client.residency()
    if as_json:
        print_json(found)
        return
    print_table(
        ("version", "tier", "size", "rank", "rows", "refs", "hits", "pinned", "adapters"),
        [_resident_row(version) for version in found.versions],
        empty="no adapters in memory",
    )
    totals = found.totals
    print(
        f"{totals.rows_used} of {totals.rows_total} rank rows, {mebibytes(totals.bytes_used)} of "
        f"{mebibytes(totals.bytes_total)}, {totals.kv_blocks_used} of {totals.kv_blocks_total} KV blocks"
    )


def _client(admin: str) -> "Client":
    from chorus.client import Client

    return Client(None, admin=admin)


def _print_versions(found: "list[AdapterVersion] | tuple[AdapterVersion, ...]") -> None:
    print_table(
        ("digest", "kind", "rank", "size", "task", "pinned", "created"),
        [
            (v.digest, v.kind, v.max_rank, mebibytes(v.size_bytes), v.task, _yes(v.pinned), _minute(v.create_time))
            for v in found
        ],
        empty="no versions",
    )


def _resident_row(v: "ResidentVersion") -> tuple[object, ...]:
    from chorus.client.names import adapter_of

    counts = (v.max_rank, v.rank_rows, v.refs, v.hits)
    return (
        short(v.digest),
        v.tier,
        mebibytes(v.bytes),
        *counts,
        _yes(v.pinned),
        " ".join(adapter_of(name) for name in v.names),
    )


def _aliases(aliases: dict[str, str]) -> str:
    return ", ".join(f"{alias} -> {short(digest)}" for alias, digest in aliases.items()) or "no alias"


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def _yes(flag: bool) -> str:
    return "yes" if flag else ""
