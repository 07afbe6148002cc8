"""A client that says what bytes it likes and sees what bytes come back."""

import asyncio
import json
from dataclasses import dataclass

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@dataclass
class Answer:
    """One parsed answer. `whole` is false when it ended before its framing said so."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool = True

    @property
    def json(self):
        return json.loads(self.body)


def chat_request(document=None, *lines: str, path: str = "/v1/chat/completions", method: str = "POST") -> bytes:
    body = json.dumps(CHAT if document is None else document).encode()
    head = [f"{method} {path} HTTP/1.1", "host: gateway", "content-type: application/json", *lines]
    return "\r\n".join([*head, f"content-length: {len(body)}", "", ""]).encode() + body


class RawClient:
    """`async with RawClient(address) as client`; with `tls` it is a client of 127.0.0.1.

    `pause` is the seconds that it takes over each chunk of an answer.
    """

    def __init__(self, address, tls=None) -> None:
        self.host, self.port, self.tls = address.host, address.port, tls
        self.pause = 0.0

    async def __aenter__(self):
        name = "127.0.0.1" if self.tls else None
        self.reader, self.writer = await asyncio.open_connection(
            self.host, self.port, ssl=self.tls, server_hostname=name
        )
        return self

    async def __aexit__(self, *_):
        self.writer.close()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, method: str = "POST") -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        status = int(head[0].split()[1])
        if method == "HEAD" or status in (204, 304):
            return Answer(status, headers, b"")
        try:
            return Answer(status, headers, await self._body(headers))
        except asyncio.IncompleteReadError as cut:
            return Answer(status, headers, cut.partial, whole=False)
        except ConnectionError:
            return Answer(status, headers, b"", whole=False)

    async def ask(self, document=None, *lines: str, **options) -> Answer:
        self.send(chat_request(document, *lines, **options))
        return await self.answer(options.get("method", "POST"))

    async def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            return await self._chunks()
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        return await self.reader.read()

    async def _chunks(self) -> bytes:
        body = b""
        while True:
            try:
                size = int(await self.reader.readuntil(b"\r\n"), 16)
                body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            except (asyncio.IncompleteReadError, ConnectionError):
                raise asyncio.IncompleteReadError(body, None) from None
            if not size:
                return body
            if self.pause:
                await asyncio.sleep(self.pause)
