"""docs/api.md is what the protos say, and what it calls built is built."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chorus.services.admin import AdaptersServicer
from chorus.services.inference import InferenceServicer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def api_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "protos/api_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_fresh(api_page: ModuleType) -> None:
    assert (ROOT / "docs/api.md").read_text() == api_page.read().text(), "run make protos and commit"


def test_everything_in_the_contract_says_what_it_is(api_page: ModuleType) -> None:
    page = api_page.read()
    assert page.without_comment() == []
    assert page.text().count("| `") > 150


@pytest.mark.parametrize("servicer", [InferenceServicer, AdaptersServicer])
def test_what_is_not_built_is_said_to_be(api_page: ModuleType, servicer: type[Any]) -> None:
    own = {name: method for name, method in vars(servicer).items() if name[0].isupper()}
    stubs = {name for name, method in own.items() if "_not_built(" in inspect.getsource(method)}
    assert stubs == api_page.NOT_BUILT & own.keys()
    assert len(own) > len(stubs)
