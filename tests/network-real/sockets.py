"""Python's modules of the network: a server of each kind, and a client that asks them all.

    sockets.py serve PORT DIRECTORY            on PORT (socketserver), +1 (http.server), +2 (ssl), +3 (asyncio), +4 (UDP)
    sockets.py ask PORT DIRECTORY ADDRESS SEEN [world]      SEEN is where the servers see it; `world` has names
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import hashlib
import http.client
import http.server
import os
import select
import selectors
import socket
import socketserver
import ssl
import struct
import sys
import threading
import unittest
import urllib.error
import urllib.request

DATA = os.urandom(4 << 20)
PATIENCE = 50
PKTINFO = struct.Struct("16sI")


# ---------------------------------------------------------------- the servers


class Talk(socketserver.StreamRequestHandler):
    """What to do is the first line."""

    def handle(self):
        with contextlib.suppress(OSError):
            getattr(self, self.rfile.readline().strip().decode())()

    def late(self):
        """Answers when the other has ended his half."""
        self.wfile.write(self.rfile.read())

    def early(self):
        """Ends its own half at once; what came then is told in another connection."""
        name = self.rfile.readline()
        self.wfile.write(b"over")
        self.connection.shutdown(socket.SHUT_WR)
        digest = hashlib.sha256(self.rfile.read()).hexdigest()
        with self.server.news:
            self.server.came[name] = digest
            self.server.news.notify_all()

    def came(self):
        name = self.rfile.readline()
        with self.server.news:
            self.server.news.wait_for(lambda: name in self.server.came, PATIENCE)
            self.wfile.write(self.server.came.pop(name).encode())

    def silent(self):
        """Says and reads nothing, until the other goes."""
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        poll.poll(PATIENCE * 1000)

    def reset(self):
        self.rfile.readline()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def who(self):
        self.wfile.write(self.client_address[0].removeprefix("::ffff:").encode())


class Server(socketserver.ThreadingTCPServer):
    address_family, daemon_threads, request_queue_size, allow_reuse_address = socket.AF_INET6, True, 200, True
    came, news = {}, threading.Condition()


class Pages(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-digest", hashlib.sha256(body).hexdigest())
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for at in range(0, len(self.path) * 1000, 1000):
            self.wfile.write(b"3e8\r\n" + self.path.encode()[at // 1000 :][:1] * 1000 + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


class HttpServer(http.server.ThreadingHTTPServer):
    address_family, request_queue_size = socket.AF_INET6, 200
    # Without a look for its name, which nobody knows.
    server_bind = socketserver.TCPServer.server_bind


class Secure(socketserver.StreamRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError), self.server.context.wrap_socket(self.connection, server_side=True) as secure:
            while data := secure.recv(65536):
                secure.sendall(data)
            # The other has said that he ends; so do we.
            secure.unwrap()


def answer_datagrams(port):
    """Sends each back, from the address that it came to."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        server.bind(("::", port))
        while True:
            data, control, _, peer = server.recvmsg(65536, socket.CMSG_SPACE(PKTINFO.size))
            (to,) = [PKTINFO.unpack(value)[0] for _, kind, value in control if kind == socket.IPV6_PKTINFO]
            info = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, PKTINFO.pack(to, 0))]
            with contextlib.suppress(OSError):
                server.sendmsg([data[: len(data) // 2], data[len(data) // 2 :]], info, 0, peer)


async def answer_lines(reader, writer):
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
        writer.close()


async def serve(port, directory):
    secure = Server(("::", port + 2), Secure)
    secure.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    secure.context.load_cert_chain(f"{directory}/tls.crt", f"{directory}/tls.key")
    for server in (Server(("::", port), Talk), HttpServer(("::", port + 1), Pages), secure):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Thread(target=answer_datagrams, args=(port + 4,), daemon=True).start()
    server = await asyncio.start_server(answer_lines, ["0.0.0.0", "::"], port + 3, backlog=200)
    print("ready", flush=True)
    await server.serve_forever()


# ---------------------------------------------------------------- the clients


class Case(unittest.TestCase):
    def talk(self, what, **options):
        connection = self.enterContext(socket.create_connection((ADDRESS, PORT), PATIENCE, **options))
        connection.sendall(what.encode() + b"\n")
        return connection

    def read_all(self, connection):
        return b"".join(iter(lambda: connection.recv(65536), b""))


class Tcp(Case):
    def test_half_close_then_the_answer(self):
        connection = self.talk("late")
        connection.sendall(DATA)
        connection.shutdown(socket.SHUT_WR)
        self.assertEqual(self.read_all(connection), DATA)

    def test_data_after_the_servers_end(self):
        name = os.urandom(8).hex()
        connection = self.talk(f"early\n{name}")
        self.assertEqual(self.read_all(connection), b"over")
        connection.sendall(DATA)
        connection.shutdown(socket.SHUT_WR)
        self.assertEqual(self.read_all(self.talk(f"came\n{name}")).decode(), hashlib.sha256(DATA).hexdigest())

    def test_a_reset_is_one(self):
        connection = self.talk("reset")
        connection.sendall(b"now\n")
        with self.assertRaises(ConnectionResetError):
            self.read_all(connection)

    def test_nobody_listens(self):
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection((ADDRESS, 9), PATIENCE)
        with socket.socket(FAMILY) as connection:
            connection.setblocking(False)
            self.assertEqual(connection.connect_ex((ADDRESS, 9)), errno.EINPROGRESS)
            poll = selectors.DefaultSelector()
            poll.register(connection, selectors.EVENT_WRITE)
            self.assertTrue(poll.select(PATIENCE))
            self.assertEqual(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), errno.ECONNREFUSED)

    def test_timeouts(self):
        connection = self.talk("silent")
        connection.settimeout(0.2)
        with self.assertRaises(TimeoutError):
            connection.recv(1)
        # A reader that does not read holds the sender up, for as long as that takes.
        with self.assertRaises(TimeoutError):
            while True:
                connection.sendall(DATA)
        connection.setblocking(False)
        with self.assertRaises(BlockingIOError):
            connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def test_ways_to_send_and_receive(self):
        connection = self.talk("late")
        parts = [DATA[:1000], bytearray(DATA[1000:3000]), memoryview(DATA)[3000:5000]]
        self.assertEqual(connection.sendmsg(parts), 5000)
        with open(f"{DIRECTORY}/tls.crt", "rb") as file:
            content = file.read()
            self.assertEqual(connection.sendfile(file), len(content))
        with connection.makefile("wb") as file:
            file.write(b"a line\n")
        connection.shutdown(socket.SHUT_WR)
        # With a time-out the descriptor is non-blocking, and nothing is waited for.
        connection.settimeout(None)
        self.assertEqual(connection.recv(10, socket.MSG_PEEK), DATA[:10])
        self.assertEqual(connection.recv(4000, socket.MSG_WAITALL), DATA[:4000])
        buffers = [bytearray(600), bytearray(400)]
        self.assertEqual(connection.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0], 1000)
        self.assertEqual(b"".join(buffers), DATA[4000:5000])
        room = bytearray(len(content))
        self.assertEqual(connection.recv_into(room, 0, socket.MSG_WAITALL), len(content))
        self.assertEqual(room, content)
        with connection.makefile("r") as file:
            self.assertEqual(list(file), ["a line\n"])

    def test_addresses_and_options(self):
        connection = self.talk("who", source_address=("", 0))
        self.assertEqual(connection.getpeername()[:2], (ADDRESS, PORT))
        self.assertEqual(self.read_all(connection).decode(), SEEN)
        for level, option in ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_TCP, socket.TCP_NODELAY)):
            connection.setsockopt(level, option, 1)
            self.assertEqual(connection.getsockopt(level, option), 1)

    def test_many_at_once(self):
        def echo(number):
            with socket.create_connection((ADDRESS, PORT), PATIENCE) as connection:
                connection.sendall(b"late\n" + DATA[: number * 100])
                connection.shutdown(socket.SHUT_WR)
                return self.read_all(connection) == DATA[: number * 100]

        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            self.assertTrue(all(pool.map(echo, range(200))))


class Udp(Case):
    def exchange(self, sender, receive, data):
        """What is lost is sent again, as everybody's protocols do."""
        for _ in range(30):
            sender(data)
            with contextlib.suppress(TimeoutError):
                while receive() != data:
                    pass
                return
        self.fail("30 datagrams were lost")

    def test_connected_and_not(self):
        with socket.socket(FAMILY, socket.SOCK_DGRAM) as asking:
            asking.settimeout(2)
            for size in (8, 1400, 1473, 9000, 60000):
                def receive():
                    data, peer = asking.recvfrom(65536)
                    self.assertEqual(peer[:2], (ADDRESS, PORT + 4))
                    return data

                self.exchange(lambda data: asking.sendto(data, (ADDRESS, PORT + 4)), receive, os.urandom(size))
            asking.connect((ADDRESS, PORT + 4))
            room = bytearray(1000)
            self.exchange(lambda data: asking.sendmsg([data[:1], data[1:]]), lambda: room[: asking.recv_into(room)], os.urandom(999))
            data = os.urandom(1000)

            def beginning():
                got, _, flags, _ = asking.recvmsg(10)
                # Of an earlier one, which was sent twice, the beginning is another.
                return data if got == data[:10] and flags & socket.MSG_TRUNC else got

            self.exchange(asking.send, beginning, data)

    def test_an_empty_one(self):
        with socket.socket(FAMILY, socket.SOCK_DGRAM) as asking:
            asking.settimeout(2)
            asking.connect((ADDRESS, PORT + 4))
            self.exchange(asking.send, lambda: asking.recv(10), b"")

    def test_nobody_listens(self):
        with socket.socket(FAMILY, socket.SOCK_DGRAM) as asking:
            asking.settimeout(2)
            asking.connect((ADDRESS, 9))
            with self.assertRaises(ConnectionRefusedError):
                self.exchange(asking.send, lambda: asking.recv(10), b"x")


class Names(Case):
    def test_of_addresses(self):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            ((family, got, _, _, peer),) = socket.getaddrinfo(ADDRESS, PORT, type=kind, flags=socket.AI_NUMERICHOST)
            self.assertEqual((family, got, peer[:2]), (FAMILY, kind, (ADDRESS, PORT)))
        self.assertEqual(socket.getnameinfo((ADDRESS, PORT), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV), (ADDRESS, str(PORT)))

    def test_of_the_world(self):
        if not WORLD:
            self.skipTest("its names are known inside alone")
        found = {info[4][0] for info in socket.getaddrinfo("world.test", PORT, type=socket.SOCK_STREAM)}
        self.assertIn(ADDRESS, found)
        self.assertEqual(socket.gethostbyname("world.test"), next(address for address in found if "." in address))
        with self.assertRaises(socket.gaierror) as error:
            socket.getaddrinfo("nobody.test", PORT)
        self.assertIn(error.exception.errno, (socket.EAI_NONAME, socket.EAI_NODATA))
        with socket.create_connection(("world.test", PORT), PATIENCE) as connection:
            self.assertIn(connection.getpeername()[0], found)


class Http(Case):
    def test_there_and_back(self):
        request = urllib.request.Request(f"http://{URL}:{PORT + 1}/", DATA)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            self.assertEqual(answer.headers["x-digest"], hashlib.sha256(DATA).hexdigest())
            self.assertEqual(answer.read(), DATA)

    def test_one_connection_and_chunks(self):
        connection = http.client.HTTPConnection(ADDRESS, PORT + 1, timeout=PATIENCE)
        with contextlib.closing(connection):
            for number in range(100):
                connection.request("GET", f"/{number}")
                self.assertEqual(connection.getresponse().read(), b"".join(byte.encode() * 1000 for byte in f"/{number}"))

    def test_nobody_listens(self):
        with self.assertRaises(urllib.error.URLError) as error:
            urllib.request.urlopen(f"http://{URL}:9/", timeout=PATIENCE)
        self.assertIsInstance(error.exception.reason, ConnectionRefusedError)


class Ssl(Case):
    def test_there_and_back_and_a_proper_end(self):
        context = ssl.create_default_context(cafile=f"{DIRECTORY}/tls.crt")
        plain = socket.create_connection((ADDRESS, PORT + 2), PATIENCE)
        with context.wrap_socket(plain, server_hostname="world.test") as secure:
            for at in range(0, len(DATA), 1 << 16):
                secure.sendall(DATA[at : at + (1 << 16)])
                got = b""
                while len(got) < 1 << 16:
                    got += secure.recv(1 << 16)
                self.assertEqual(got, DATA[at : at + (1 << 16)])
            secure.unwrap().close()

    def test_another_name(self):
        context = ssl.create_default_context(cafile=f"{DIRECTORY}/tls.crt")
        with socket.create_connection((ADDRESS, PORT + 2), PATIENCE) as plain, self.assertRaises(ssl.SSLCertVerificationError):
            context.wrap_socket(plain, server_hostname="other.test")


class Asyncio(unittest.IsolatedAsyncioTestCase):
    async def test_streams(self):
        async def talk(number):
            reader, writer = await asyncio.open_connection(ADDRESS, PORT + 3)
            for line in range(number):
                writer.write(f"line {line}\n".encode() * 50)
                await writer.drain()
            writer.write_eof()
            self.assertEqual(await reader.read(), b"".join(f"LINE {line}\n".encode() * 50 for line in range(number)))
            writer.close()
            await writer.wait_closed()

        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*map(talk, range(100)))

    async def test_sockets_and_cancellation(self):
        loop = asyncio.get_running_loop()
        with socket.socket(FAMILY) as connection:
            connection.setblocking(False)
            await loop.sock_connect(connection, (ADDRESS, PORT))
            await loop.sock_sendall(connection, b"silent\n")
            with self.assertRaises(TimeoutError):
                await asyncio.wait_for(loop.sock_recv(connection, 1), 0.2)
        with self.assertRaises(ConnectionRefusedError):
            await asyncio.open_connection(ADDRESS, 9)

    async def test_datagrams(self):
        class Asking(asyncio.DatagramProtocol):
            def __init__(self):
                self.got = asyncio.Queue()

            def datagram_received(self, data, _):
                self.got.put_nowait(data)

        transport, asking = await asyncio.get_running_loop().create_datagram_endpoint(Asking, remote_addr=(ADDRESS, PORT + 4))
        with contextlib.closing(transport):
            wanted = {struct.pack(">I", number) * 100 for number in range(100)}
            async with asyncio.timeout(PATIENCE):
                while wanted:
                    for data in wanted:
                        transport.sendto(data)
                    with contextlib.suppress(TimeoutError):
                        while wanted:
                            wanted.discard(await asyncio.wait_for(asking.got.get(), 2))


match sys.argv[1:]:
    case ["serve", port, directory]:
        asyncio.run(serve(int(port), directory))
    case ["ask", port, DIRECTORY, ADDRESS, SEEN, *WORLD]:
        PORT = int(port)
        FAMILY = socket.AF_INET6 if ":" in ADDRESS else socket.AF_INET
        URL = f"[{ADDRESS}]" if ":" in ADDRESS else ADDRESS
        unittest.main(argv=[sys.argv[0]])
