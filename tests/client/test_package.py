import subprocess
import sys

import chorus.client


def test_every_exported_name_is_there_and_sorted() -> None:
    assert chorus.client.__all__ == sorted(chorus.client.__all__)
    assert all(hasattr(chorus.client, name) for name in chorus.client.__all__)


def test_importing_the_client_needs_no_server_packages() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'safetensors', 'tokenizers', 'pydantic', 'yaml', 'rich', 'typer'}"
    code = f"import sys, chorus.client; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
