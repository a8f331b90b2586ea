"""Mixed load over the network, chosen by a seed, with every answer checked.

    soak.py serve PORT ADDRESS…                          TCP, and UDP at these addresses
    soak.py load SECONDS SEED WORKERS PORT ADDRESS…      asks them; from inside also names, pings and what fails

Ends with a line of JSON: how often each thing was done, how much went wrong, and what. `load` then fails. What is done with an address that
begins with `~` may fail at any time, since rules come and go; if it succeeds it must be right, too.
"""

import asyncio
import collections
import hashlib
import json
import random
import signal
import socket
import struct
import sys
import time

BLOCK = random.Random(1).randbytes(8 << 20)
LARGEST = 4 << 20
HEADER = struct.Struct(">cQQ")
# For a single thing to be done, on a busy machine.
PATIENCE = 60


def pattern(seed, size):
    start = seed % (len(BLOCK) - LARGEST)
    return BLOCK[start : start + size]


def reset(writer):
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# ---------------------------------------------------------------- the server


async def serve_one(reader, writer):
    try:
        mode, seed, size = HEADER.unpack(await reader.readexactly(HEADER.size))
        match mode:
            case b"U":
                data = await reader.read(-1) if size > 100_000 else await reader.readexactly(size)
                writer.write(hashlib.sha256(data).digest())
            case b"D":
                writer.write(pattern(seed, size))
            case b"E":
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            case b"R":
                await reader.readexactly(min(size, 1000))
                return reset(writer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    except (OSError, asyncio.IncompleteReadError):
        writer.transport.abort()


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, peer):
        self.transport.sendto(data, peer)


async def serve(port, addresses):
    loop = asyncio.get_running_loop()
    # A socket for each address, as answers must leave from where the question came to.
    for address in addresses:
        answering = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        if ":" in address:
            answering.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        answering.setblocking(False)
        answering.bind((address, port))
        await loop.create_datagram_endpoint(Echo, sock=answering)
    server = await asyncio.start_server(serve_one, ["0.0.0.0", "::"], port, backlog=1000)
    print("ready", flush=True)
    await server.serve_forever()


# ---------------------------------------------------------------- what is done


class Load:
    def __init__(self, seed, port, addresses, inside):
        self.seed, self.port, self.addresses, self.inside = seed, port, addresses, inside
        self.done, self.lax, self.wrong = collections.Counter(), collections.Counter(), []
        self.resolver = next((line.split()[1] for line in open("/etc/resolv.conf") if line.startswith("nameserver")), None)

    async def open(self, address, mode, seed, size):
        reader, writer = await asyncio.open_connection(address, self.port)
        writer.write(HEADER.pack(mode, seed, size))
        return reader, writer

    async def up(self, chance, address):
        seed, size = chance.getrandbits(32), int(2 ** chance.uniform(0, 22))
        reader, writer = await self.open(address, b"U", seed, size)
        data = pattern(seed, size)
        writer.write(data)
        if size > 100_000:
            writer.write_eof()
        await writer.drain()
        assert await reader.read(-1) == hashlib.sha256(data).digest(), f"up {size}"
        writer.close()

    async def down(self, chance, address):
        seed, size = chance.getrandbits(32), int(2 ** chance.uniform(0, 22))
        reader, writer = await self.open(address, b"D", seed, size)
        data = await reader.read(-1)
        assert data == pattern(seed, size), f"down {size}: {len(data)}"
        writer.close()

    async def talk(self, chance, address):
        reader, writer = await self.open(address, b"E", 0, 0)
        for _ in range(chance.randrange(1, 30)):
            data = chance.randbytes(chance.randrange(1, 3000))
            writer.write(data)
            assert await reader.readexactly(len(data)) == data, "talk"
        writer.close()

    async def leave(self, chance, address):
        """Goes in the middle of something, by a reset or by a close with data unread."""
        reader, writer = await self.open(address, b"D", 5, LARGEST)
        await reader.read(chance.randrange(1, 200_000))
        if chance.random() < 0.5:
            reset(writer)
        else:
            writer.close()

    async def is_left(self, chance, address):
        reader, writer = await self.open(address, b"R", 0, chance.randrange(1, 5000))
        writer.write(bytes(5000))
        try:
            assert await reader.read(-1) == b"", "a reset gives no data"
        except ConnectionError:
            pass
        writer.transport.abort()

    async def datagrams(self, chance, address):
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.setblocking(False)
            # Of few ports, or the flows of the last three minutes would be what is measured.
            for _ in range(100):
                try:
                    asking.bind(("", chance.randrange(30000, 30032)))
                    break
                except OSError:
                    await asyncio.sleep(0)
            asking.connect((address, self.port))
            for _ in range(chance.randrange(1, 10)):
                data = struct.pack(">Q", chance.getrandbits(64)) + chance.randbytes(chance.choice([0, 100, 1400, 5000, 20000]))
                # Datagrams may be lost; what comes must be what was sent.
                for _ in range(30):
                    await loop.sock_sendall(asking, data)
                    try:
                        while (got := await asyncio.wait_for(loop.sock_recv(asking, 65536), 2)) != data:
                            assert len(got) >= 8, "datagram"
                        break
                    except TimeoutError:
                        self.done["datagram again"] += 1
                else:
                    raise AssertionError("30 datagrams were lost")

    async def names(self, chance, _):
        loop = asyncio.get_running_loop()
        host = chance.choice(["world", "far", f"n{chance.randrange(300)}"])
        kind = chance.choice([1, 28])
        query = struct.pack(">HHHHHH", chance.getrandbits(16), 0x100, 1, 0, 0, 0)
        query += bytes([len(host)]) + host.encode() + b"\4test\0" + struct.pack(">HH", kind, 1)
        if chance.random() < 0.3:
            reader, writer = await asyncio.open_connection(self.resolver, 53)
            writer.write(struct.pack(">H", len(query)) + query)
            answer = await reader.readexactly(struct.unpack(">H", await reader.readexactly(2))[0])
            writer.close()
        else:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                asking.setblocking(False)
                asking.connect((self.resolver, 53))
                await loop.sock_sendall(asking, query)
                answer = await loop.sock_recv(asking, 65536)
        expected = 3 if host.startswith("n") else 0
        assert answer[:2] == query[:2] and answer[3] & 15 == expected, f"{host}: {answer}"
        assert bool(answer[7]) == (expected == 0), f"{host}: {answer}"

    async def ping(self, chance, address):
        size = chance.choice(["56", "1400", "4000"])
        process = await asyncio.create_subprocess_exec(
            "ping", "-n", "-c", "3", "-i", "0.2", "-W", "20", "-s", size, address, stdout=asyncio.subprocess.PIPE)
        text, _ = await process.communicate()
        # Where rates are bounded, queues run over: one may be lost.
        self.done["ping lost"] += b" 3 received" not in text
        assert b" 0 received" not in text, text.decode()

    async def refused(self, chance, address):
        try:
            await asyncio.open_connection(address, 9)
            raise AssertionError("nobody listens there")
        except ConnectionRefusedError:
            pass

    async def unreachable(self, chance, _):
        def connect():
            # It waits in connect(2): who polls may hear of an error before getsockopt does (tcp_v4_err), and take that for
            # a connection.
            with socket.socket() as asking:
                asking.connect(("10.77.0.99", 80))

        try:
            await asyncio.get_running_loop().run_in_executor(None, connect)
        except OSError as error:
            assert not isinstance(error, ConnectionRefusedError), error
        else:
            raise AssertionError("nobody is there")

    async def worker(self, number, until):
        chance = random.Random(f"{self.seed}.{number}")
        things = [(self.up, 20), (self.down, 20), (self.talk, 20), (self.leave, 8), (self.is_left, 8), (self.datagrams, 15)]
        if self.inside:
            things += [(self.names, 20), (self.refused, 5), (self.ping, 1), (self.unreachable, 0.2)]
        while time.monotonic() < until:
            thing = chance.choices([thing for thing, _ in things], [weight for _, weight in things])[0]
            address = chance.choice(self.addresses)
            lax = address.startswith("~")
            try:
                async with asyncio.timeout(PATIENCE):
                    await thing(chance, address.lstrip("~"))
                self.done[thing.__name__] += 1
            except Exception as error:
                # Contents are never wrong: who is cut off is reset, so that what came does not look complete.
                if lax and (not isinstance(error, AssertionError) or thing in (self.datagrams, self.ping)):
                    self.lax[thing.__name__] += 1
                else:
                    self.wrong.append(f"{thing.__name__} {address}: {type(error).__name__} {error}"[:300])


async def load(seconds, seed, workers, port, addresses, inside):
    doing = Load(seed, port, addresses, inside)
    until = time.monotonic() + seconds
    await asyncio.gather(*(doing.worker(number, until) for number in range(workers)))
    print(json.dumps({"done": doing.done, "cut off by rules": doing.lax, "count": len(doing.wrong), "wrong": doing.wrong[:20]}), flush=True)
    return not doing.wrong


async def inside(seconds, seed, workers, port, addresses):
    """Serves, and asks others from the signal SIGUSR1 on."""
    start = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, start.set)
    serving = asyncio.create_task(serve(port, ["0.0.0.0", "::"]))
    await start.wait()
    await load(seconds, seed, workers, port, addresses, True)
    # The sandbox rests, until it is ended.
    await serving


match sys.argv[1:]:
    case ["serve", port, *addresses]:
        asyncio.run(serve(int(port), addresses))
    case ["load", seconds, seed, workers, port, *addresses]:
        sys.exit(not asyncio.run(load(float(seconds), seed, int(workers), int(port), addresses, False)))
    case ["inside", seconds, seed, workers, port, *addresses]:
        asyncio.run(inside(float(seconds), seed, int(workers), int(port), addresses))
