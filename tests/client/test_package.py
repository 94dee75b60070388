import re
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires

import chorus.client


def test_every_exported_name_is_there_and_sorted() -> None:
    assert chorus.client.__all__ == sorted(chorus.client.__all__)
    assert all(hasattr(chorus.client, name) for name in chorus.client.__all__)


def test_importing_the_client_needs_no_server_packages() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'safetensors', 'tokenizers', 'pydantic', 'yaml', 'rich', 'typer'}"
    code = f"import sys, chorus.client; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_importing_the_client_takes_little_more_than_importing_grpc() -> None:
    # Processor time, and the best of three in turns, as machines differ, and this one may be busy with other things.
    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    taken = [(seconds("import chorus.client"), seconds("import grpc.aio")) for _ in range(3)]
    assert min(ours for ours, _ in taken) < 3 * min(grpcs for _, grpcs in taken)


def needed(distribution: str, seen: set[str]) -> set[str]:
    """All that installing a distribution brings, without extras, by what each says it requires."""
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:  # for another system or Python
        return seen
    for line in lines:
        name = re.sub(r"[-_.]+", "-", re.split(r"[ ;<>=!~\[(]", line, maxsplit=1)[0]).lower()
        if "extra ==" not in line and name not in seen:
            seen.add(name)
            needed(name, seen)
    return seen


def test_the_bare_distribution_brings_nothing_that_computes() -> None:
    brought = needed("chorus-serve", set())
    assert {"grpcio", "protobuf"} <= brought
    assert not brought & {"torch", "numpy", "transformers", "tokenizers", "safetensors", "peft", "triton"}
