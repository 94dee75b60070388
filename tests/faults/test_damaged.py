"""Fault 11: an adapter's files change on disk after it was published."""

from pathlib import Path

import pytest

from chorus.client import Client
from chorus.errors import DataLoss
from support.claims import assert_solo_greedy, until
from support.server import ServerProcess
from support.worlds import PROMPT, TinyWorld


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_changed_bytes_are_data_loss_for_that_version_alone_until_it_is_pushed_again(
    calm: ServerProcess, client: Client, world: TinyWorld, name: str
) -> None:
    tenant = f"t11-{name[8:13].strip('_')}"
    sound = world.adapter(f"sound-{tenant}")
    client.push(sound, tenant=tenant, name="sound")
    folder = world.adapter(f"damaged-{tenant}")
    pushed = client.push(folder, tenant=tenant, name="damaged")
    flip_last_byte(calm.state_dir / "blobs" / "sha256" / pushed.digest[:2] / pushed.digest / name)

    for _ in range(2):
        with pytest.raises(DataLoss) as caught:
            client.generate(PROMPT, adapter=f"{tenant}/damaged", max_tokens=4)
        assert str(calm.state_dir) not in caught.value.message
        assert "push it again" in caught.value.message
    answer = client.generate(PROMPT, adapter=f"{tenant}/sound", max_tokens=8, temperature=0, ignore_eos=True)
    assert_solo_greedy(world.base, sound, PROMPT, answer.token_ids)
    until(lambda: all(version.digest != pushed.digest for version in client.residency().versions), "nothing is held")

    assert not client.push(folder, tenant=tenant, name="damaged").created, "it is the same version"
    answer = client.generate(PROMPT, adapter=f"{tenant}/damaged", max_tokens=8, temperature=0, ignore_eos=True)
    assert_solo_greedy(world.base, folder, PROMPT, answer.token_ids)
