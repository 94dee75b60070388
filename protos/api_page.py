"""Writes docs/api.md from the protos and their comments: `make protos` does, and `make protos-check` finds it stale.

python protos/api_page.py docs/api.md
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

PROTOS = Path(__file__).parent
HEAD = """# API

Made from the comments in `protos/` by `make protos`; do not edit.

Two gRPC services, each on a port of its own: [chorus.v1.Inference](#inference) for tenants (`--port`), and
[chorus.admin.v1.Adapters](#adapters) for operators (`--admin-port`). Both ports have reflection and `grpc.health.v1`,
the operators' also channelz. RPCs that say "not built yet" answer UNIMPLEMENTED with the reason METHOD_NOT_BUILT.

Names are `tenants/{tenant}/adapters/{adapter}`, which means the version behind the alias `live`; `@ALIAS` after it
means another alias, and `/versions/DIGEST` one version. Ids are lower-case letters, digits and hyphens, 1 to 63.
Scalars marked optional differ from 0 when unset.

Errors are `google.rpc.Status` with `ErrorInfo(reason, domain="chorus")`, `BadRequest` with a path and a description
for each wrong field, and `RetryInfo` where trying again may help:

| code | when |
|---|---|
| INVALID_ARGUMENT | a field out of range, not finite or malformed; a corrupt adapter; a prompt over the context |
| NOT_FOUND | no such adapter, alias or version; another tenant's looks the same |
| FAILED_PRECONDITION | well formed, but not servable here: base, kind, rank, no live version, no chat template |
| ABORTED | a stale etag, or a version deleted while it was loading |
| RESOURCE_EXHAUSTED | queue full, no room for the adapter, reader too slow, message too large |
| DEADLINE_EXCEEDED | the deadline passed, queued or running |
| UNAVAILABLE | draining, or the engine is gone |
| DATA_LOSS | stored bytes no longer match their digest |
| UNIMPLEMENTED | in the contract, not built yet |
| INTERNAL | a bug; the text carries an id that is also in the log |
"""
# Paths of source locations: field numbers of FileDescriptorProto and its parts.
MESSAGE, ENUM, SERVICE = 4, 5, 6
FIELD, METHOD, VALUE = 2, 2, 2
NOT_BUILT = frozenset(
    {"Classify", "TagTokens", "Answer", "Embed", "CreateTenant", "CreateApiKey", "RevokeApiKey", "SetQuota"}
)
_TYPES = {value: name.removeprefix("TYPE_").lower() for name, value in FieldDescriptorProto.Type.items()}


class Page:
    """The page of some proto files."""

    def __init__(self, files: list[FileDescriptorProto]) -> None:
        self._files = files
        self._comments = {
            (file.name, tuple(location.path)): " ".join(location.leading_comments.split())
            for file in files
            for location in file.source_code_info.location
        }

    def text(self) -> str:
        parts = [HEAD]
        for file in self._files:
            for i, service in enumerate(file.service):
                path = SERVICE, i, METHOD
                rows = (self._method(file, method, (*path, j)) for j, method in enumerate(service.method))
                table = "\n".join(["| rpc | takes | gives | |", "|---|---|---|---|", *rows])
                parts += [f"## {service.name}\n", self._said(file, SERVICE, i) + "\n", table + "\n"]
        for package in dict.fromkeys(file.package for file in self._files):
            parts.append(f"## Messages of {package}\n")
            for file in (file for file in self._files if file.package == package):
                for i, message in enumerate(file.message_type):
                    parts += self._message(file, message, i)
                for i, enum in enumerate(file.enum_type):
                    parts += self._enum(file, enum, i)
        return "\n".join(parts)

    def without_comment(self) -> list[str]:
        """Services, RPCs, messages, fields, enums and values that say nothing of themselves."""
        return [name for file in self._files for name, path in _everything(file) if not self._said(file, *path)]

    def _method(self, file: FileDescriptorProto, method: MethodDescriptorProto, path: tuple[int, ...]) -> str:
        takes = ("stream " if method.client_streaming else "") + _link(method.input_type)
        gives = ("stream " if method.server_streaming else "") + _link(method.output_type)
        said = self._said(file, *path) + (" *Not built yet.*" if method.name in NOT_BUILT else "")
        return f"| `{method.name}` | {takes} | {gives} | {said} |"

    def _message(self, file: FileDescriptorProto, message: DescriptorProto, index: int) -> Iterator[str]:
        maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        yield f'<a id="{_anchor(f".{file.package}.{message.name}")}"></a>\n### {message.name}\n'
        if said := self._said(file, MESSAGE, index):
            yield said + "\n"
        if not message.field:
            yield "No fields.\n"
            return
        rows = ["| field | type | number | |", "|---|---|---|---|"]
        for i, field in enumerate(message.field):
            said = self._said(file, MESSAGE, index, FIELD, i)
            if field.HasField("oneof_index") and not field.proto3_optional:
                said = f"One of `{message.oneof_decl[field.oneof_index].name}`. {said}".strip()
            rows.append(f"| `{field.name}` | {_type(field, maps)} | {field.number} | {said} |")
        yield "\n".join(rows) + "\n"

    def _enum(self, file: FileDescriptorProto, enum: EnumDescriptorProto, index: int) -> Iterator[str]:
        yield f'<a id="{_anchor(f".{file.package}.{enum.name}")}"></a>\n### {enum.name}\n'
        if said := self._said(file, ENUM, index):
            yield said + "\n"
        values = (
            f"| `{value.name}` | {value.number} | {self._said(file, ENUM, index, VALUE, i)} |"
            for i, value in enumerate(enum.value)
        )
        yield "\n".join(["| value | number | |", "|---|---|---|", *values]) + "\n"

    def _said(self, file: FileDescriptorProto, *path: int) -> str:
        return self._comments.get((file.name, path), "")


def _everything(file: FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All that is defined in a file, and where its comment is kept."""
    for i, service in enumerate(file.service):
        yield service.name, (SERVICE, i)
        for j, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (SERVICE, i, METHOD, j)
    for i, message in enumerate(file.message_type):
        yield message.name, (MESSAGE, i)
        for j, field in enumerate(message.field):
            yield f"{message.name}.{field.name}", (MESSAGE, i, FIELD, j)
    for i, enum in enumerate(file.enum_type):
        yield enum.name, (ENUM, i)
        for j, value in enumerate(enum.value):
            yield f"{enum.name}.{value.name}", (ENUM, i, VALUE, j)


def read() -> Page:
    """The page of all protos here, sources parsed anew."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "protos"
        options = ["--include_source_info", "--include_imports", f"--descriptor_set_out={target}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTOS), *options, *sources], check=True)
        files = FileDescriptorSet.FromString(target.read_bytes()).file
    by_name = {file.name: file for file in files}
    order = sorted(sources, key=lambda name: ("admin" in name, not by_name[name].service, name))
    return Page([by_name[name] for name in order])


def _type(field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    if entry := maps.get(field.type_name.rpartition(".")[2]):
        key, value = entry.field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    name = _link(field.type_name) if field.type_name else _TYPES[field.type]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(name: str) -> str:
    """A message's or enum's name, linked where it is on the page."""
    short = name.rpartition(".")[2]
    return f"[{short}](#{_anchor(name)})" if name.startswith(".chorus.") else f"`{name.removeprefix('.')}`"


def _anchor(name: str) -> str:
    return name.removeprefix(".").replace(".", "-").lower()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(read().text())
