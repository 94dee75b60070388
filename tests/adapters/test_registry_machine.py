"""The registry against a plain dictionary, in any order of calls, with restarts in between."""

import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chorus.adapters.names import AdapterName
from chorus.adapters.records import VersionRecord
from chorus.adapters.registry import Lease, Registry
from chorus.errors import FailedPrecondition, NotFound

NAMES = st.builds(AdapterName, st.sampled_from(["t", "u"]), st.sampled_from(["a", "b"]))
DIGESTS = st.sampled_from([digit * 64 for digit in "123"])
ALIASES = st.sampled_from(["live", "canary"])


class RegistryMachine(RuleBasedStateMachine):
    """`content` is what a blob store would hold: added with an upload's lease, removed by the registry's callback."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.model: dict[AdapterName, tuple[set[str], dict[str, str]]] = {}
        self.content: set[str] = set()
        self.leases: list[Lease] = []
        self.registry = self.open()

    def open(self) -> Registry:
        return Registry(Path(self.folder.name), on_unreferenced=self.content.discard)

    def teardown(self) -> None:
        self.registry.close()
        self.folder.cleanup()

    @rule(name=NAMES, digest=DIGESTS, alias=st.none() | ALIASES)
    def create(self, name: AdapterName, digest: str, alias: str | None) -> None:
        with self.registry.lease(digest):
            self.content.add(digest)
            _, created = self.registry.create_version(name, VersionRecord(digest, "LORA", 1, 1, 1, 0.0), alias)
        versions, aliases = self.model.setdefault(name, (set(), {}))
        assert created is (digest not in versions)
        versions.add(digest)
        if alias:
            aliases[alias] = digest

    @rule(name=NAMES, digest=DIGESTS | st.just(""), alias=ALIASES)
    def set_alias(self, name: AdapterName, digest: str, alias: str) -> None:
        versions, aliases = self.model.get(name, (set(), {}))
        if name not in self.model or (digest and digest not in versions):
            expect(NotFound, lambda: self.registry.set_alias(name, alias, digest))
            return
        self.registry.set_alias(name, alias, digest, self.registry.get(name).etag)
        aliases.pop(alias, None)
        if digest:
            aliases[alias] = digest

    @rule(name=NAMES, digest=DIGESTS)
    def delete_version(self, name: AdapterName, digest: str) -> None:
        versions, aliases = self.model.get(name, (set(), {}))
        if digest not in versions:
            expect(NotFound, lambda: self.registry.delete_version(name, digest))
        elif digest in aliases.values():
            expect(FailedPrecondition, lambda: self.registry.delete_version(name, digest))
        else:
            self.registry.delete_version(name, digest)
            versions.remove(digest)

    @rule(name=NAMES)
    def delete_adapter(self, name: AdapterName) -> None:
        if name in self.model:
            self.registry.delete_adapter(name)
            del self.model[name]
        else:
            expect(NotFound, lambda: self.registry.delete_adapter(name))

    @rule(name=NAMES)
    def hold(self, name: AdapterName) -> None:
        _, aliases = self.model.get(name, (set(), {}))
        if name not in self.model:
            expect(NotFound, lambda: self.registry.hold(name))
        elif "live" not in aliases:
            expect(FailedPrecondition, lambda: self.registry.hold(name))
        else:
            version, lease = self.registry.hold(name)
            assert version.digest == aliases["live"]
            self.leases.append(lease)

    @rule(at=st.integers(0, 9))
    def release(self, at: int) -> None:
        if at < len(self.leases):
            self.leases.pop(at).release()

    @rule()
    def restart(self) -> None:
        before = self.registry.list()
        self.registry.close()
        self.leases.clear()
        self.registry = self.open()
        self.content &= self.registry.digests()  # what the blob store's sweep does
        assert self.registry.list() == before

    @invariant()
    def records_are_the_models(self) -> None:
        found = {record.name: record for record in self.registry.list()[0]}
        assert found.keys() == self.model.keys()
        for name, (versions, aliases) in self.model.items():
            assert {version.digest for version in found[name].versions} == versions
            assert found[name].aliases == aliases

    @invariant()
    def content_is_there_exactly_as_long_as_someone_needs_it(self) -> None:
        needed = Counter(lease.digest for lease in self.leases)
        needed.update(digest for versions, _ in self.model.values() for digest in versions)
        assert self.content == needed.keys()


def expect(error: type[Exception], call: object) -> None:
    assert callable(call)
    try:
        call()
    except error:
        return
    raise AssertionError(f"{error.__name__} was expected")


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
