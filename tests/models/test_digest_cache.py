"""Weight files are hashed once, and again whenever they changed."""

import os
from pathlib import Path

import pytest

from chorus.models.digest_cache import DigestCache


class Hashing:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, path: Path) -> str:
        self.asked += 1
        return f"digest of {path.read_text()}"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_text("one")
    return path


def test_an_unchanged_file_is_hashed_once_also_over_a_restart(weights: Path, tmp_path: Path) -> None:
    hashing = Hashing()
    for _ in range(3):
        assert DigestCache(tmp_path / "state" / "digests.json").digest(weights, hashing) == "digest of one"
    assert hashing.asked == 1


@pytest.mark.parametrize("change", ["content", "time"])
def test_a_changed_file_is_hashed_again(change: str, weights: Path, tmp_path: Path) -> None:
    cache, hashing = DigestCache(tmp_path / "digests.json"), Hashing()
    cache.digest(weights, hashing)
    if change == "content":
        weights.write_text("three")
    else:
        os.utime(weights, ns=(0, 0))
    assert cache.digest(weights, hashing) == f"digest of {weights.read_text()}"
    assert hashing.asked == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"x": 1}', b"null"])
def test_a_damaged_cache_is_made_anew(content: bytes, weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "digests.json"
    file.write_bytes(content)
    hashing = Hashing()
    assert DigestCache(file).digest(weights, hashing) == DigestCache(file).digest(weights, hashing) == "digest of one"
    assert hashing.asked == 1


def test_a_cache_that_can_not_be_written_is_logged_and_nothing_else(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    assert DigestCache(tmp_path / "taken" / "digests.json").digest(weights, Hashing()) == "digest of one"
    assert "could not be kept" in caplog.text
