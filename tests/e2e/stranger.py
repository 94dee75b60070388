"""A client that has nothing of ours, no stubs either: finds chorus.v1.Inference by reflection and calls it.

Run as `stranger.py HOST:PORT PROMPT`; prints what it found as one JSON object.
"""

import json
import sys
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def main(address: str, prompt: str) -> dict[str, Any]:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        service = DescriptorPool(database).FindServiceByName("chorus.v1.Inference")
        method = service.methods_by_name["Generate"]
        ask, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        generate: Any = channel.unary_stream(
            f"/{service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        sampling = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
        messages = list(generate(ask(text=prompt, sampling=sampling), timeout=30))
        reasons: Any = answer.DESCRIPTOR.fields_by_name["finish_reason"].enum_type
        found = {
            "services": sorted(database.get_services()),
            "methods": [each.name for each in service.methods],
            "messages": len(messages),
            "text": "".join(message.text for message in messages),
            "tokens": sum(len(message.token_ids) for message in messages),
            "completion_tokens": messages[-1].usage.completion_tokens,
            "finish_reason": reasons.values_by_number[messages[-1].finish_reason].name,
        }
        try:
            list(generate(ask(text=prompt, adapter="tenants/nobody/adapters/nothing"), timeout=30))
        except grpc.RpcError as error:
            found["error"] = read_error(error)
        found["ours"] = sorted(name for name in sys.modules if name.partition(".")[0] == "chorus")
        return found


def read_error(error: Any) -> dict[str, str]:
    status, info = status_pb2.Status(), error_details_pb2.ErrorInfo()
    status.ParseFromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert status.details[0].Unpack(info)
    return {"code": error.code().name, "message": status.message, "reason": info.reason, "domain": info.domain}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
