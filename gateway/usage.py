"""What an answer or an event states beside its text: token counts, under OpenAI's and Anthropic's names, and load."""

from __future__ import annotations

import msgspec


class Details(msgspec.Struct, gc=False):
    cached_tokens: int = -1


class Usage(msgspec.Struct, gc=False):
    """Token counts."""

    prompt_tokens: int = -1
    completion_tokens: int = -1
    input_tokens: int = -1
    output_tokens: int = -1
    prompt_tokens_details: Details | None = None


class _Nested(msgspec.Struct, gc=False):
    usage: Usage | None = None


class _WithUsage(msgspec.Struct, gc=False):
    usage: Usage | None = None
    message: _Nested | str | None = None  # Anthropic's message_start
    response: _Nested | None = None  # OpenAI's response.completed


class _WithLoad(msgspec.Struct, gc=False):
    load: msgspec.Raw


_decode = msgspec.json.Decoder(_WithUsage).decode
_decode_load = msgspec.json.Decoder(_WithLoad).decode


def load_in(document: bytes) -> bytes:
    """The `load` that a backend tells beside the usage of an event, as it is written; b"" without. Never raises."""
    try:
        return bytes(_decode_load(document).load)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return b""


def usage_of(document: bytes) -> tuple[int, int, int]:
    """Tokens (in, out, of those in: cached) that an answer or event states; -1 where it does not. Never raises."""
    try:
        found = _decode(document)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return -1, -1, -1
    usage = found.usage
    if usage is None and found.response is not None:
        usage = found.response.usage
    if usage is None and isinstance(found.message, _Nested):
        usage = found.message.usage
    if usage is None:
        return -1, -1, -1
    tokens_in = usage.prompt_tokens if usage.prompt_tokens >= 0 else usage.input_tokens
    tokens_out = usage.completion_tokens if usage.completion_tokens >= 0 else usage.output_tokens
    details = usage.prompt_tokens_details
    return tokens_in, tokens_out, -1 if details is None else details.cached_tokens
