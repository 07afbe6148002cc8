"""The token counts that an answer or an event states, under OpenAI's and Anthropic's names."""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, gc=False):
    """Token counts."""

    prompt_tokens: int = -1
    completion_tokens: int = -1
    input_tokens: int = -1
    output_tokens: int = -1


class _Nested(msgspec.Struct, gc=False):
    usage: Usage | None = None


class _WithUsage(msgspec.Struct, gc=False):
    usage: Usage | None = None
    message: _Nested | str | None = None  # Anthropic's message_start
    response: _Nested | None = None  # OpenAI's response.completed


_decode = msgspec.json.Decoder(_WithUsage).decode


def usage_of(document: bytes) -> tuple[int, int]:
    """Tokens (in, out) that a JSON answer or event states; -1 where it does not. Never raises."""
    try:
        found = _decode(document)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return -1, -1
    usage = found.usage
    if usage is None and found.response is not None:
        usage = found.response.usage
    if usage is None and isinstance(found.message, _Nested):
        usage = found.message.usage
    if usage is None:
        return -1, -1
    tokens_in = usage.prompt_tokens if usage.prompt_tokens >= 0 else usage.input_tokens
    tokens_out = usage.completion_tokens if usage.completion_tokens >= 0 else usage.output_tokens
    return tokens_in, tokens_out
