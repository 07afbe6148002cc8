"""The bytes of the work: one chat request, one answer, one event. Their sizes are part of what is measured."""

from __future__ import annotations

MODEL = "tiny"
PATH = "/v1/chat/completions"
EVENTS = 101
EVENT_BYTES = 170


def chat_request(*, model: str = MODEL, stream: bool = False) -> bytes:
    """About 180 bytes as a client sends them; a stream asks for its usage."""
    ending = b',"stream":true,"stream_options":{"include_usage":true}}' if stream else b"}"
    return (
        b'{"model":"%s","messages":[{"role":"system","content":"You are a helpful assistant."},'
        b'{"role":"user","content":"What is the capital of France, and why?"}],"max_tokens":32' % model.encode()
    ) + ending


ANSWER = (
    b'{"id":"chatcmpl-123","object":"chat.completion","created":1677652288,"model":"tiny","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"Paris, since the year 987 or so: that is where the king had his court."'
    b'},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":27,"completion_tokens":7,"total_tokens":34}}'
)


def event(last: bool = False) -> bytes:
    """One SSE event of EVENT_BYTES; the last one has the usage and the end of the stream behind it."""
    head = b'data: {"id":"chatcmpl-123","object":"chat.completion.chunk","created":1677652288,"model":"tiny",'
    if last:
        text = head + b'"choices":[],"usage":{"prompt_tokens":27,"completion_tokens":99,"total_tokens":126}}\n\n'
        return text + b"data: [DONE]\n\n"
    middle = b'"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n'
    return head + middle % (b"x" * (EVENT_BYTES - len(head) - len(middle) + 2))
