"""A whole server in this process, on free ports of loopback, over a scripted engine."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from transformers import PreTrainedTokenizerFast

from chorus.admin.v1 import adapters_pb2_grpc
from chorus.config import ServerConfig
from chorus.models.facts import BaseFacts
from chorus.services.assembly import ChorusServer, ServedBase
from chorus.v1 import inference_pb2_grpc
from services.fakes import FACTS, FakeEngine, byte_tokenizer
from services.harness import MakeRig, Rig

BYTES = byte_tokenizer()


@pytest.fixture
async def make_rig(tmp_path: Path) -> AsyncIterator[MakeRig]:
    """Starts servers; keyword arguments go into the configuration, but for `tokenizer` (None: none) and `facts`."""
    rigs: list[Rig] = []

    async def make(
        *, tokenizer: PreTrainedTokenizerFast | None = BYTES, facts: BaseFacts = FACTS, **settings: Any
    ) -> Rig:
        defaults: dict[str, Any] = {
            "port": 0,
            "admin_port": 0,
            "metrics_port": 0,
            "state_dir": tmp_path,
            "max_adapter_mb": 1,
        }
        config = ServerConfig.model_validate(defaults | {"drain_grace_s": 5.0} | settings)
        engines: list[FakeEngine] = []

        def make_engine(*callbacks: Any) -> FakeEngine:
            engine = FakeEngine(*callbacks)
            engine.base_digest, engine.max_rank = facts.digest, config.max_rank
            engines.append(engine)
            return engine

        base = ServedBase(facts, tokenizer)
        server = ChorusServer(config, base, make_engine)
        try:
            endpoints = await server.start()
        except BaseException:
            await server.close()
            raise
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{endpoints.port}")
        admin = grpc.aio.insecure_channel(f"127.0.0.1:{endpoints.admin_port}")
        rig = Rig(
            server=server,
            engine=engines[0],
            endpoints=endpoints,
            channel=channel,
            admin_channel=admin,
            inference=inference_pb2_grpc.InferenceStub(channel),
            admin=adapters_pb2_grpc.AdaptersStub(admin),
            health=health_pb2_grpc.HealthStub(channel),
            config=config,
        )
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        await rig.channel.close()
        await rig.admin_channel.close()
        await rig.server.close()


@pytest.fixture
async def rig(make_rig: MakeRig) -> Rig:
    return await make_rig()
