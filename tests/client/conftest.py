from collections.abc import Iterator
from pathlib import Path

import pytest

from chorus.client import Client
from client.fake_chorus import FakeChorus


@pytest.fixture
def fake() -> Iterator[FakeChorus]:
    with FakeChorus() as server:
        yield server


@pytest.fixture
def client(fake: FakeChorus) -> Iterator[Client]:
    with Client(fake.address, admin=fake.address, timeout=20) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder as PEFT leaves it, with files that must not be sent beside it."""
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 10_000)
    (path / "README.md").write_text("private notes")
    (path / "optimizer.pt").write_bytes(b"not for anybody")
    return path
