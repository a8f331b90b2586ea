"""The servers of the lab's `world`. Ports are listed in tests/common/lab.rs."""

import asyncio
import hashlib
import http.server
import socket
import struct
import sys
import threading

ADDRESSES = ["10.77.0.2", "fd77::2", "203.0.113.7", "2001:db8:7::7"]
PATTERN = bytes(range(251)) * 1000
SOURCE_SIZE = 32 << 20


async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def summary(reader, writer):
    digest, length = hashlib.sha256(), 0
    while data := await reader.read(1 << 20):
        digest.update(data)
        length += len(data)
    writer.write(f"{length} {digest.hexdigest()}\n".encode())
    await writer.drain()


async def source(_, writer):
    sent = 0
    while sent < SOURCE_SIZE:
        part = PATTERN[: SOURCE_SIZE - sent]
        writer.write(part)
        await writer.drain()
        sent += len(part)


async def reset(reader, writer):
    await reader.read(1)
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def half_close(reader, writer):
    writer.write(b"goodbye")
    writer.write_eof()
    data = await reader.read(-1)
    HEARD.append(data)


HEARD = []
RELEASED = asyncio.Event()


async def stall(reader, writer):
    await RELEASED.wait()
    await summary(reader, writer)


async def release(_, writer):
    RELEASED.set()
    writer.write(b"released")
    await writer.drain()


async def heard(_, writer):
    writer.write(repr(HEARD).encode())
    await writer.drain()


async def who(_, writer):
    writer.write(writer.get_extra_info("peername")[0].encode())
    await writer.drain()


def closing(handler):
    async def handle(reader, writer):
        try:
            await handler(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    return handle


def datagrams(address, port, answer):
    """A thread: asyncio does not send empty datagrams."""
    server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, port))

    def serve():
        while True:
            data, peer = server.recvfrom(65536)
            server.sendto(answer(data, peer), peer)

    threading.Thread(target=serve, daemon=True).start()


class Pages(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = f"hello from the world, {self.path}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class PagesV6(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


async def main():
    services = {
        7: echo, 9001: summary, 9002: source, 9003: reset, 9004: half_close, 9005: stall,
        9006: release, 9007: who, 9008: heard,
    }
    for port, handler in services.items():
        await asyncio.start_server(closing(handler), ADDRESSES, port, backlog=4096, limit=1 << 20)
    for address in ADDRESSES:
        for port, answer in ((7, lambda data, _: data), (9007, lambda _, peer: peer[0].encode())):
            datagrams(address, port, answer)
        kind = PagesV6 if ":" in address else http.server.ThreadingHTTPServer
        threading.Thread(target=kind((address, 80), Pages).serve_forever, daemon=True).start()
    with open(sys.argv[1], "w") as ready:
        ready.write("ready\n")
    await asyncio.Event().wait()


asyncio.run(main())
