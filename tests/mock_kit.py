"""A client of the mock that sees every byte and when it came."""

import http.client
import socket
import time
from urllib.parse import urlsplit

import numpy as np
import orjson

MS = 1_000_000


def starter(mock_engine):
    """`start("ttft=0.01", ...)` -> a client of a mock that keeps the truth."""

    def start(*settings):
        told = ["ttft=0.01", "gap=0.002", "record_truth=true", *settings]
        return Client(mock_engine(*[f"backend.{s}" for s in told]).url)

    return start


class Client:
    def __init__(self, url):
        self.at = urlsplit(url).hostname, urlsplit(url).port

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection(*self.at, timeout=20)
        connection.request(method, path, body if body is None or isinstance(body, bytes) else orjson.dumps(body))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content

    def truth(self):
        """Rows by seed."""
        return {row["seed"]: row for row in orjson.loads(self.call("GET", "/truth")[1])["requests"]}

    def open(self, seed=0, tokens=8, path="/v1/completions", **body):
        """A socket on which a streamed request was sent."""
        if "messages" not in body:
            body = {"prompt": [5, 6, 7], **body}
        content = orjson.dumps({"model": "mock", "max_tokens": tokens, "stream": True, "seed": seed, **body})
        s = socket.create_connection(self.at, timeout=20)
        s.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        return s

    def stream(self, *args, **kwargs):
        return read(self.open(*args, **kwargs))


class Read:
    """A response as it came: `pieces` of (ns, bytes)."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.head, _, body = b"".join(data for _, data in pieces).partition(b"\r\n\r\n")
        self.body = dechunked(body) if b"chunked" in self.head else body
        self.payloads = [e.removeprefix(b"data: ") for e in self.body.split(b"\n\n")[:-1]]

    @property
    def events(self):
        return [orjson.loads(p) for p in self.payloads if p != b"[DONE]"]

    @property
    def ids(self):
        return [i for e in self.events for c in e["choices"] for i in c.get("token_ids", [])]

    @property
    def text(self):
        said = [c.get("text") or c.get("delta", {}).get("content", "") for e in self.events for c in e["choices"]]
        return "".join(said)


def read(s):
    pieces, end = [], b""
    while not end.endswith((b"\r\n0\r\n\r\n", b"[DONE]\n\n")):
        data = s.recv(1 << 16)
        if not data:
            break
        pieces.append((time.monotonic_ns(), data))
        end = (end + data)[-20:]
    s.close()
    return Read(pieces)


def dechunked(body):
    chunks, at = [], 0
    while at < len(body):
        start = body.index(b"\r\n", at) + 2
        size = int(body[at : start - 2], 16)
        chunks.append(body[start : start + size])
        at = start + size + 2
    return b"".join(chunks)


def lateness(row, due):
    """Nanoseconds of each event of a row after it was due; `due` in seconds after the arrival."""
    return np.array(row["sent"]) - row["arrived"] - np.round(np.array(due) * 1e9).astype(int)
