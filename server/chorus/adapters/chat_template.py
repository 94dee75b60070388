"""An adapter's own chat template, as a stranger wrote it: checked before anything runs it.

It is compiled by transformers, for jinja's immutable sandbox: no attribute that starts with an underscore, no change
of what it is given, no file, no import. What makes much out of little is refused here, because it runs in C where no
time limit reaches it, and because jinja computes constants while it compiles: powers, multiplication, padding, string
formatting, large numbers. Time is limited where it runs (`chorus.services.chat`). Memory is not: a loop that doubles a
text in every turn is only ended by the clock. Whoever may push an adapter is trusted that far.
"""

import hashlib

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from chorus.adapters.strict_json import quote
from chorus.errors import InvalidArgument

MAX_CHARS = 65_536
MAX_NUMBER = 100_000
"""Of a number in a template; also the longest `range` that the sandbox grants."""
_PADDING = frozenset({"center", "expandtabs", "format", "format_map", "indent", "ljust", "rjust", "wordwrap", "zfill"})


def check(template: str, field: str) -> None:
    """Refuses what is no template, and what is not for a server.

    Raises:
        InvalidArgument: says what, and in which line.
    """
    try:
        environment: Environment = _compile_jinja_template("").environment
        for node in environment.parse(template).find_all(nodes.Node):
            _check(node, field)
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise _refusal(field, error.lineno, quote(str(error.message), 200)) from None
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError):
        raise _refusal(field, 1, "it can not be compiled") from None


def digest(template: str) -> str:
    """SHA-256, hex, of a template's UTF-8."""
    return hashlib.sha256(template.encode()).hexdigest()


def _check(node: nodes.Node, field: str) -> None:
    match node:
        case nodes.Include() | nodes.Import() | nodes.FromImport() | nodes.Extends():
            raise _refusal(field, node.lineno, "there are no other templates to read")
        case nodes.Pow():
            raise _refusal(field, node.lineno, "powers are not allowed")
        case nodes.Mul():
            raise _refusal(field, node.lineno, "multiplication is not allowed")
        case nodes.Mod(left=nodes.Const(value=str())):
            raise _refusal(field, node.lineno, "string formatting is not allowed")
        case (
            nodes.Filter(name=name) | nodes.Getattr(attr=name) | nodes.Getitem(arg=nodes.Const(value=str() as name))
        ) if name in _PADDING:
            raise _refusal(field, node.lineno, f"{name} is not allowed")
        case nodes.Const(value=int() | float() as number) if abs(number) > MAX_NUMBER:
            raise _refusal(field, node.lineno, f"numbers must not be over {MAX_NUMBER}")


def _refusal(field: str, line: int, problem: str) -> InvalidArgument:
    text = f"{field}: line {line} of the template: {problem}"
    return InvalidArgument(text, reason="BAD_CHAT_TEMPLATE", field=field)
