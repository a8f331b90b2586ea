"""A storm of frames that no honest kernel would send, from inside a sandbox, and what must still work
around it. Run as the payload: frames.py WORLD4 WORLD6 NOBODY4 SEED

Prints one line for each step and waits for the end of standard input before it ends with status 7.
"""

import random
import socket
import struct
import sys

WORLD4, WORLD6, NOBODY4, SEED = sys.argv[1:]
RANDOM = random.Random(int(SEED))
SOL_PACKET, PACKET_VNET_HDR, ETH_P_ARP = 263, 15, 0x0806
ARP, IP4, IP6 = 0x0806, 0x0800, 0x86DD
ICMP, TCP, UDP, ICMP6 = 1, 6, 17, 58
# Not of the range from which the kernel takes ports for the honest flows.
PORTS = range(1024, 30000)


def say(*words):
    print(*words, flush=True)


# ---------------------------------------------------------------- the link

raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
raw.bind(("tap0", 0))
# A second one, by which the kernel lets a frame carry an offload header of the sender's choice.
offload = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
offload.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
offload.bind(("tap0", 0))
answers = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ARP))
answers.bind(("tap0", ETH_P_ARP))
answers.settimeout(50)

OWN_MAC = raw.getsockname()[4]
with open("/etc/resolv.conf") as conf:
    resolvers = [line.split()[1] for line in conf if line.startswith("nameserver")]
GATEWAY4 = next(address for address in resolvers if ":" not in address)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((WORLD4, 9))
    OWN4 = probe.getsockname()[0]
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
    probe.connect((WORLD6, 9))
    OWN6 = probe.getsockname()[0]
with open("/proc/net/ipv6_route") as routes:
    default = next(line.split() for line in routes if line.split()[1] == "00" and line.split()[4] != "0" * 32)
GATEWAY6 = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(default[4]))
a4 = lambda text: socket.inet_pton(socket.AF_INET, text)
a6 = lambda text: socket.inet_pton(socket.AF_INET6, text)

GATEWAY_MAC = b"\xff" * 6
sent = refused = 0


def put(frame, through=raw):
    """Sends a frame. What the kernel itself refuses (too long, no offload of that kind) goes nowhere."""
    global sent, refused
    try:
        through.send(frame)
        sent += 1
    except OSError:
        refused += 1
    if sent % 128 == 0:
        settle()


def settle():
    """The gateway answers in order: afterwards everything that was sent has been looked at, and the
    link's queue is empty."""
    global GATEWAY_MAC
    request = struct.pack("!HHBBH6s4s6s4s", 1, IP4, 6, 4, 1, OWN_MAC, a4(OWN4), bytes(6), a4(GATEWAY4))
    raw.send(b"\xff" * 6 + OWN_MAC + struct.pack("!H", ARP) + request)
    while True:
        frame = answers.recv(2048)
        if frame[20:22] == b"\0\2" and frame[28:32] == a4(GATEWAY4) and frame[:6] == OWN_MAC:
            GATEWAY_MAC = frame[22:28]
            return


# ---------------------------------------------------------------- packets, right where nothing is said

def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def eth(kind, payload, source=None):
    return GATEWAY_MAC + (source or OWN_MAC) + struct.pack("!H", kind) + payload


def ip4(protocol, payload, to=WORLD4, source=OWN4, length=None, ihl=None, options=b"", ident=1, fragment=0, ttl=64,
        version=4, wrong=False):
    header = bytearray(struct.pack(
        "!BBHHHBBH4s4s", version << 4 | ((ihl if ihl is not None else 5 + len(options) // 4) & 15), 0,
        (length if length is not None else 20 + len(options) + len(payload)) & 0xFFFF,
        ident & 0xFFFF, fragment & 0xFFFF, ttl, protocol, 0, a4(source), a4(to)) + options)
    header[10:12] = struct.pack("!H", 1 if wrong else checksum(bytes(header)))
    return eth(IP4, bytes(header) + payload)


def ip6(protocol, payload, to=WORLD6, source=OWN6, length=None, ttl=64, version=6):
    return eth(IP6, struct.pack("!IHBB16s16s", version << 28, (length if length is not None else len(payload)) & 0xFFFF,
                                protocol, ttl, a6(source), a6(to)) + payload)


def sealed(protocol, segment, at, to, source=None):
    """A segment with its checksum, which is at `at`."""
    six = ":" in to
    convert = a6 if six else a4
    source = source or (OWN6 if six else OWN4)
    pseudo = convert(source) + convert(to) + (struct.pack("!II", len(segment), protocol) if six else
                                              struct.pack("!BBH", 0, protocol, len(segment)))
    if protocol == ICMP:
        pseudo = b""
    segment = segment[:at] + b"\0\0" + segment[at + 2:]
    return segment[:at] + struct.pack("!H", checksum(pseudo + segment)) + segment[at + 2:]


def tcp(to, port, source_port=None, flags=2, offset=None, options=b"", payload=b"", seq=None, ack=0, window=1000):
    options += b"\0" * (-len(options) % 4)
    segment = struct.pack(
        "!HHIIBBHHH", source_port or RANDOM.choice(PORTS), port, RANDOM.getrandbits(32) if seq is None else seq, ack,
        ((5 + len(options) // 4 if offset is None else offset) & 15) << 4, flags, window, 0, RANDOM.getrandbits(16))
    return sealed(TCP, segment + options + payload, 16, to)


def udp(to, port, payload=b"x", source_port=None, length=None):
    header = struct.pack("!HHHH", RANDOM.choice(PORTS) if source_port is None else source_port, port,
                         (8 + len(payload) if length is None else length) & 0xFFFF, 0)
    return sealed(UDP, header + payload, 6, to)


def wrap(protocol, segment, to):
    return (ip6 if ":" in to else ip4)(protocol, segment, to)


def lengths(right):
    """Values for a length field that are wrong."""
    return sorted({0, 1, 7, 8, 19, 20, 39, 40, right - 1, right + 1, right + 8, 1500, 9000, 0x7FFF, 0xFFF8, 0xFFFF} - {right})


# ---------------------------------------------------------------- kinds of attack

def of_ethernet():
    for length in range(14, 74):
        put(GATEWAY_MAC + OWN_MAC + RANDOM.randbytes(length - 12))
    for kind in (0, 1, 46, 0x5DC, 0x5DD, 0x600, 0x8100, 0x88A8, 0x8847, 0x888E, 0xFFFF):
        put(eth(kind, b""))
        put(eth(kind, RANDOM.randbytes(60)))
        put(eth(kind, struct.pack("!HH", 0, IP4) + ip4(UDP, udp(WORLD4, 7))[14:]))
    for kind in (ARP, IP4, IP6):
        for length in range(0, 60):
            put(eth(kind, b"\0" * length))
            put(eth(kind, RANDOM.randbytes(length)))
    # A sender that is nobody, a group, or the gateway itself.
    for source in (bytes(6), b"\xff" * 6, b"\x01\0\x5e\0\0\1", GATEWAY_MAC):
        put(eth(IP4, ip4(UDP, udp(WORLD4, 7))[14:], source))


def of_arp():
    for hardware, protocol, hlen, plen, operation in [
        (1, IP4, 6, 4, 0), (1, IP4, 6, 4, 3), (1, IP4, 6, 4, 0xFFFF), (1, IP4, 0, 0, 1), (1, IP4, 255, 255, 1),
        (1, IP4, 6, 16, 1), (0, IP4, 6, 4, 1), (6, IP4, 8, 4, 1), (1, IP6, 6, 4, 1), (1, IP4, 4, 6, 1),
    ]:
        head = struct.pack("!HHBBH", hardware, protocol, hlen, plen, operation)
        for body in (b"", OWN_MAC + a4(OWN4) + bytes(6) + a4(GATEWAY4), RANDOM.randbytes(hlen * 2 + plen * 2)):
            put(eth(ARP, head + body))
    for claimed in (GATEWAY4, "0.0.0.0", "255.255.255.255", "127.0.0.1"):
        for operation in (1, 2):
            put(eth(ARP, struct.pack("!HHBBH6s4s6s4s", 1, IP4, 6, 4, operation, OWN_MAC, a4(claimed), b"\xff" * 6, a4(claimed))))


def of_ip4():
    body = udp(WORLD4, 7, b"lengths")
    for ihl in range(16):
        put(ip4(UDP, body, ihl=ihl))
        put(ip4(UDP, b"", ihl=ihl))
    for length in lengths(20 + len(body)):
        put(ip4(UDP, body, length=length))
    for version in range(16):
        put(ip4(UDP, body, version=version))
    for ttl in (0, 1, 2, 255):
        put(ip4(UDP, body, ttl=ttl))
    put(ip4(UDP, body, wrong=True))
    for protocol in range(256):
        put(ip4(protocol, RANDOM.randbytes(RANDOM.randrange(64))))
    for kind in (0, 1, 7, 68, 130, 131, 136, 137, 148, 255):
        for length in (0, 1, 2, 3, 4, 11, 39, 40, 255):
            options = (bytes([kind, length, 4]) + a4(WORLD4) * 10)[:40]
            put(ip4(UDP, body, options=options[: RANDOM.choice((4, 8, 40))].ljust(40, b"\1")))
    for source in ("0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", GATEWAY4, WORLD4):
        put(ip4(UDP, udp(WORLD4, 7), source=source))
    for to in ("0.0.0.0", "127.0.0.1", "169.254.169.254", "224.0.0.251", "255.255.255.255", "240.0.0.1", GATEWAY4):
        put(ip4(UDP, udp(to, 7), to=to))
        put(ip4(TCP, tcp(to, 7), to=to))


def of_fragments():
    body = udp(WORLD4, 7, RANDOM.randbytes(2000))
    whole = 0x2000
    # Overlaps of every kind, holes, ends beyond 65,535, ends that contradict each other.
    for ident, parts in enumerate([
        [(0, 800, 1), (80, 800, 1), (160, 728, 0)], [(0, 1480, 1), (0, 1480, 1), (1480, 528, 0)],
        [(0, 36, 1), (24, 4, 0)], [(0, 8, 1), (8, 8, 1), (0, 2008, 0)], [(65528, 8, 0)], [(65528, 1400, 0)],
        [(65528, 1400, 1), (0, 8, 1)], [(0, 2000, 0)], [(1480, 528, 0), (1480, 100, 0), (0, 1480, 1)],
        [(0, 0, 1), (0, 0, 0)], [(8, 0, 0), (0, 8, 1)], [(0, 7, 1), (8, 9, 0)], [(1480, 528, 0), (0, 1488, 1)],
    ]):
        for start, length, more in parts:
            piece = (body + bytes(2000))[start % 2000 : start % 2000 + length][:1480]
            put(ip4(UDP, piece, ident=1000 + ident, fragment=(whole if more else 0) | start >> 3))
            extension = struct.pack("!BBHI", UDP, 0, start | more, 1000 + ident)
            put(ip6(44, extension + piece[:1440]))
    put(ip6(44, struct.pack("!BBHI", 44, 0, 0, 5) * 100))
    put(ip6(44, struct.pack("!BBHI", 44, 0, 1, 5) * 100))
    put(ip6(44, b"\x11\0\0"))
    # Beginnings of datagrams that never end.
    for ident in range(6000):
        put(ip4(UDP, b"\0" * 1480, ident=ident, fragment=whole | RANDOM.randrange(0, 4000)))
        put(ip6(44, struct.pack("!BBHI", UDP, 0, RANDOM.randrange(0, 65536) & ~7 | 1, ident) + b"\0" * 1400))
    # One datagram in as many pieces as there can be.
    for start in range(0, 65536 - 64, 8):
        put(ip4(UDP, b"\0" * 8, ident=7777, fragment=whole | start >> 3))


def of_ip6():
    body = udp(WORLD6, 7, b"lengths")
    for length in lengths(len(body)):
        put(ip6(UDP, body, length=length))
    for version in range(16):
        put(ip6(UDP, body, version=version))
    for protocol in range(256):
        put(ip6(protocol, RANDOM.randbytes(RANDOM.randrange(64))))
        put(ip6(protocol, b""))
    # A jumbogram, with a length that is true and ones that are not.
    for length in (0, 1, 65535, 65536, 0xFFFFFFFF):
        put(ip6(0, struct.pack("!BBBBI", UDP, 0, 0xC2, 4, length) + body, length=0))
    for kind in (0, 43, 60, 51, 135, 139, 140):
        for length in (0, 1, 2, 30, 127, 255):
            put(ip6(kind, bytes([UDP, length]) + b"\1\4" * 3 + body))
            put(ip6(kind, bytes([kind, length]) + b"\1\0" * 600))
        # Long chains, and ones that end in nothing.
        put(ip6(kind, bytes([kind, 0, 1, 4, 0, 0, 0, 0]) * 170 + body))
        put(ip6(kind, bytes([kind, 0, 1, 4, 0, 0, 0, 0]) * 50))
        put(ip6(kind, bytes([59, 0, 1, 4, 0, 0, 0, 0])))
        for option in (0, 1, 5, 0x63, 0xC2, 0xFF):
            put(ip6(kind, bytes([UDP, 0, option, RANDOM.randrange(256), 0, 0, 0, 0]) + body))
    # A routing header of type 0, which the world must not see obeyed.
    put(ip6(43, struct.pack("!BBBBI", UDP, 2, 0, 1, 0) + a6(WORLD6) + body))
    for source in ("::", "::1", "ff02::1", "fe80::1", GATEWAY6, WORLD6, "::ffff:127.0.0.1"):
        put(ip6(UDP, udp(WORLD6, 7), source=source))
    for to in ("::", "::1", "ff02::1", "ff05::2", "fe80::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", GATEWAY6):
        put(ip6(UDP, udp(to, 7), to=to))
        put(ip6(TCP, tcp(to, 7), to=to))


def of_icmp():
    inner4 = ip4(UDP, udp(WORLD4, 7))[14:]
    inner6 = ip6(UDP, udp(WORLD6, 7))[14:]
    for kind in range(0, 45):
        for code in (0, 3, 4, 255):
            for body in (b"", bytes(3), bytes(4) + inner4[:20], bytes(4) + inner4, bytes(4) + RANDOM.randbytes(40)):
                put(ip4(ICMP, sealed(ICMP, bytes([kind, code, 0, 0]) + body, 2, WORLD4), RANDOM.choice((WORLD4, GATEWAY4))))
    for kind in (*range(0, 5), *range(127, 162), 255):
        for code in (0, 255):
            for body in (b"", bytes(3), bytes(4) + inner6[:40], bytes(4) + inner6, bytes(4) + RANDOM.randbytes(40)):
                to = RANDOM.choice((WORLD6, GATEWAY6))
                put(ip6(ICMP6, sealed(ICMP6, bytes([kind, code, 0, 0]) + body, 2, to), to))
    # Neighbour discovery with options of no length, of too much, and of the wrong kind.
    for kind, fixed in ((133, bytes(4)), (134, bytes(12)), (135, bytes(4) + a6(GATEWAY6)), (136, bytes(4) + a6(GATEWAY6)),
                        (137, bytes(4) + a6(GATEWAY6) + a6(WORLD6))):
        for option in range(0, 26):
            for length in (0, 1, 2, 32, 255):
                message = bytes([kind, 0, 0, 0]) + fixed + bytes([option, length]) + OWN_MAC
                for to in (GATEWAY6, "ff02::1"):
                    for ttl in (255, 64):
                        put(ip6(ICMP6, sealed(ICMP6, message, 2, to), to, ttl=ttl))


def of_udp():
    for to in (WORLD4, WORLD6, GATEWAY4, GATEWAY6):
        right = udp(to, 53, b"payload")
        for length in lengths(len(right)):
            put(wrap(UDP, udp(to, 53, b"payload", length=length), to))
        for cut in range(8):
            put(wrap(UDP, right[:cut], to))
        for port, source_port in ((0, 5000), (7, 0), (0, 0), (65535, 65535)):
            put(wrap(UDP, udp(to, port, b"", source_port=source_port), to))
        put(wrap(UDP, right[:6] + b"\0\0" + right[8:], to))
        put(wrap(UDP, right[:6] + b"\1\1" + right[8:], to))


def of_tcp():
    for to in (WORLD4, WORLD6):
        for offset in range(16):
            for length in (0, 4, 20, 40):
                put(wrap(TCP, tcp(to, 7, offset=offset, payload=bytes(length)), to))
        for cut in range(20):
            put(wrap(TCP, tcp(to, 7)[:cut], to))
        for kind in range(0, 36):
            for length in (0, 1, 2, 3, 4, 10, 40, 255):
                put(wrap(TCP, tcp(to, 7, options=(bytes([kind, length]) + RANDOM.randbytes(38))[: RANDOM.choice((4, 12, 40))]), to))
        for flags in range(256):
            for window in (0, 1, 65535):
                put(wrap(TCP, tcp(to, 7, flags=flags, window=window, ack=RANDOM.getrandbits(32), payload=bytes(RANDOM.randrange(3))), to))
        for port in (0, 65535):
            put(wrap(TCP, tcp(to, port), to))
        # A connection that exists, with flags, numbers and windows that cannot be.
        with socket.create_connection((to, 7)) as victim:
            for _ in range(2000):
                segment = tcp(to, 7, victim.getsockname()[1], RANDOM.getrandbits(8), None, b"", RANDOM.randbytes(RANDOM.randrange(3)),
                              RANDOM.getrandbits(32), RANDOM.getrandbits(32), RANDOM.getrandbits(16))
                put(wrap(TCP, segment, to))


def of_dns():
    name = b"\5world\4test\0"
    question = struct.pack("!HH", 1, 1)
    head = lambda flags=0x100, counts=(1, 0, 0, 0): struct.pack("!HHHHHH", RANDOM.getrandbits(16), flags, *counts)
    queries = [
        head() + b"\xc0\x0c" + question, head() + b"\1a\xc0\x0c" + question, head() + b"\xc0\x0e\xc0\x0c" + question,
        head() + b"\xff\xff" + question, head() + b"\xc0", head() + b"\x3f" + b"a" * 62, head() + b"\x40aa\0" + question,
        head() + b"\x80aa\0" + question, head() + (b"\x3f" + b"a" * 63) * 4 + b"\0" + question,
        head() + b"\1a" * 200 + b"\0" + question, head() + name, head() + name + b"\0", head() + b"\0" + question, head(),
        head(counts=(65535, 0, 0, 0)) + name + question, head(counts=(0, 65535, 65535, 65535)) + name + question,
        head(counts=(2, 0, 0, 0)) + name + question + b"\xc0\x0c" + question, head(0x8180) + name + question,
        head(0xFFFF) + name + question, head(0x7900) + name + question, b"", b"\0", bytes(11), bytes(12), b"\xff" * 512,
        head(counts=(1, 0, 0, 1)) + name + question + b"\0\0\x29\xff\xff\0\0\0\0\xff\xff", head() + name + struct.pack("!HH", 251, 255),
        head(counts=(1, 0, 0, 2)) + name + question + b"\0\0\x29\4\xd0\0\0\0\0\0\0" * 2, head() + bytes([5]) + b"\0\x1b[2J\0" + question,
    ]
    queries += [RANDOM.randbytes(RANDOM.randrange(600)) for _ in range(500)]
    for query in list(queries):
        if query:
            damaged = bytearray(query)
            damaged[RANDOM.randrange(len(damaged))] = RANDOM.getrandbits(8)
            queries.append(bytes(damaged))
    for query in queries:
        for to in (GATEWAY4, GATEWAY6):
            put(wrap(UDP, udp(to, 53, query), to))
    for at, query in enumerate(queries[:200]):
        with socket.create_connection((GATEWAY4, 53)) as stream:
            stream.sendall(struct.pack("!H", RANDOM.choice((len(query), 0, 1, 65535))) + query)
            if at % 2:
                stream.shutdown(socket.SHUT_WR)
    # Answers that nobody asked for.
    for _ in range(100):
        put(ip4(UDP, udp(GATEWAY4, RANDOM.choice(PORTS), RANDOM.randbytes(100), source_port=53), GATEWAY4))


def of_offloads():
    """Offload headers: sizes and offsets that lie, and super-segments far beyond the link's MTU."""
    for _ in range(3000):
        to = RANDOM.choice((WORLD4, WORLD6))
        payload = bytes(RANDOM.choice((0, 1, 100, 1400, 4000, 20000, 60000)))
        flags = RANDOM.choice((2, 16, 24, 25))
        protocol, segment, at = RANDOM.choice(((TCP, tcp(to, 7, flags=flags, payload=payload), 16), (UDP, udp(to, 7, payload), 6)))
        frame = wrap(protocol, segment, to)
        start = 54 if ":" in to else 34
        size = RANDOM.choice((1, 7, 536, 1448, 1460, 0xFFFF))
        if RANDOM.randrange(2):
            # As an honest kernel has it, but for the sizes.
            kind = 5 if protocol == UDP else 4 if ":" in to else 1
            header = struct.pack("=BBHHHH", 1, kind, RANDOM.choice((start + 20, 0xFFFF)), size, start, at)
        else:
            header = struct.pack(
                "=BBHHHH", RANDOM.choice((0, 1, 2, 3, 255)), RANDOM.choice((0, 1, 3, 4, 5, 0x80, 0x81, 0x84, 255)),
                RANDOM.choice((0, 14, 34, 54, 66, 74, len(frame) & 0xFFFF, 0xFFFF)), RANDOM.choice((0, size)),
                RANDOM.choice((0, 13, 14, 34, 54, len(frame) & 0xFFFF, 0xFFFF)), RANDOM.choice((0, 6, 16, 0xFFFF)))
        put(header + frame, offload)


def of_damage():
    """Honest packets with a few wrong bytes, cut or prolonged."""
    seeds = []
    for to in (WORLD4, WORLD6, GATEWAY4, GATEWAY6):
        echo = bytes([128 if ":" in to else 8, 0, 0, 0, 0, 7, 0, 1]) + bytes(16)
        seeds += [wrap(UDP, udp(to, 7), to), wrap(TCP, tcp(to, 7, options=b"\2\4\5\xb4\1\3\3\7"), to),
                  wrap(ICMP6 if ":" in to else ICMP, sealed(ICMP6 if ":" in to else ICMP, echo, 2, to), to)]
    for _ in range(20000):
        frame = bytearray(RANDOM.choice(seeds))
        for _ in range(RANDOM.randrange(1, 4)):
            frame[RANDOM.randrange(14, len(frame))] = RANDOM.getrandbits(8)
        if RANDOM.randrange(8) == 0:
            del frame[RANDOM.randrange(14, len(frame)):]
        elif RANDOM.randrange(8) == 0:
            frame += RANDOM.randbytes(RANDOM.randrange(1400 - len(frame)))
        if frame[12:14] == b"\x08\0" and len(frame) >= 34:
            frame[24:26] = b"\0\0"
            frame[24:26] = struct.pack("!H", checksum(bytes(frame[14:34])))
        put(bytes(frame))


def half_open():
    """A hundred thousand flows of which each is begun and none is finished: to who answers, to who does
    not, and to ports where nobody listens."""
    for number in range(100_000):
        to = (NOBODY4, WORLD4, WORLD6)[0 if number % 10 else 1 + number // 10 % 2]
        source_port = PORTS[number % len(PORTS)]
        put(wrap(TCP, tcp(to, 7 + number // len(PORTS), source_port), to))


def many_ports():
    """Datagrams from one port to every port, and from very many ports."""
    for port in range(1, 65536, 3):
        put(ip4(UDP, udp(WORLD4, port, source_port=20000), WORLD4))
    for port in PORTS[:20000]:
        put(ip4(UDP, udp(WORLD4, 7, source_port=port), WORLD4))
    for ident in range(5000):
        echo = struct.pack("!BBHHH", 8, 0, 0, ident, 1)
        put(ip4(ICMP, sealed(ICMP, echo, 2, WORLD4), WORLD4))


# ---------------------------------------------------------------- what must still work

def everything(sock):
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


def works(old):
    for sock in old:
        message = RANDOM.randbytes(100_000)
        sock.sendall(message)
        got = b""
        while len(got) < len(message):
            part = sock.recv(65536)
            assert part, "an old connection was ended"
            got += part
        assert got == message, "an old connection carries something else"
    for world in (WORLD4, WORLD6):
        with socket.create_connection((world, 80), timeout=50) as page:
            page.sendall(b"GET /after HTTP/1.0\r\nConnection: close\r\n\r\n")
            assert b"hello from the world, /after" in everything(page)
        with socket.socket(socket.AF_INET6 if ":" in world else socket.AF_INET, socket.SOCK_DGRAM) as datagram:
            datagram.settimeout(50)
            datagram.connect((world, 7))
            datagram.send(b"echo")
            assert datagram.recv(100) == b"echo"
            # The storm's own road leads to the world: the same datagram as a frame of ours.
            put(wrap(UDP, udp(world, 7, b"by hand", datagram.getsockname()[1]), world))
            assert datagram.recv(100) == b"by hand"
    found = {info[4][0] for info in socket.getaddrinfo("world.test", 80, proto=socket.IPPROTO_TCP)}
    assert found == {WORLD4, WORLD6}, found


old = [socket.create_connection((world, 7), timeout=50) for world in (WORLD4, WORLD6)]
works(old)
settle()
say("before")
for attack in (of_ethernet, of_arp, of_ip4, of_ip6, of_fragments, of_icmp, of_udp, of_tcp, of_dns, of_offloads, of_damage,
               half_open, many_ports):
    sent = refused = 0
    attack()
    settle()
    works(old)
    say(attack.__name__, sent, refused)
say("after")
sys.stdin.read()
works(old)
say("end")
sys.exit(7)
