"""The log's own lines: one object each, with what the call knows, and without texts that may quote a request."""

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from chorus import logs

log = logging.getLogger("chorus.tests")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What is logged, as JSON at debug level; the root logger is given back as it was."""
    root, ours = logging.getLogger(), logging.getLogger("chorus")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    stream = io.StringIO()
    logs.set_up("json", "debug", stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRPC_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")


def test_line_is_one_object_with_the_calls_facts(written: io.StringIO) -> None:
    with logs.call("/chorus.v1.Inference/Generate", "r1"):
        logs.note(tenant="acme")
        log.debug("a line\nof %s", "two", extra={"fields": {"code": "OK"}})
    log.info("outside")
    inside, outside = map(json.loads, written.getvalue().splitlines())
    assert (inside["level"], inside["logger"], inside["message"]) == ("debug", "chorus.tests", "a line\nof two")
    assert (inside["request_id"], inside["tenant"], inside["code"]) == ("r1", "acme", "OK")
    assert "request_id" not in outside


def test_other_libraries_speak_from_warning_on_and_in_the_same_form(written: io.StringIO) -> None:
    logging.getLogger("jinja2").debug("a template")
    logging.getLogger("transformers").warning("careful")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    first, second = map(json.loads, written.getvalue().splitlines())
    assert (first["logger"], first["message"]) == ("transformers", "careful")
    assert second["logger"] == "py.warnings"


class Model(BaseModel):
    number: int


def test_exception_that_quotes_its_input_keeps_its_frames_and_loses_its_text(written: io.StringIO) -> None:
    canary = "qvxz" + "canary"  # not as it stands in the source, which the frames quote
    try:
        try:
            Model.model_validate({"number": canary})
        except ValueError as error:
            raise RuntimeError("while checking") from error
    except RuntimeError:
        log.exception("a bug")
    [line] = map(json.loads, written.getvalue().splitlines())
    assert "qvxzcanary" not in line["exception"]
    assert "ValidationError: (its text may quote a request)" in line["exception"]
    assert "RuntimeError: while checking" in line["exception"]
    assert "test_logs.py" in line["exception"]
