"""Drives a program on a pseudo terminal, as a person would, by a script on standard input.

    terminal.py PROGRAM ARG...      script: one JSON list per line

    ["expect", TEXT]     waits until TEXT comes out (escape sequences taken away)
    ["send", TEXT]       types
    ["size", ROWS, COLS] resizes the terminal
    ["kill", SIGNAL]     sends a signal to PROGRAM
    ["end"]              waits for the end of PROGRAM
    ["settings"]         prints whether the terminal's settings are what they were at the start

The program is a child of a shell-like parent: it has the terminal as its controlling terminal
and is its foreground process group. Prints what came out as the last line, in JSON.
"""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time

DEADLINE = time.monotonic() + 50 * int(os.environ.get("ROOTLET_TEST_SLOW") or 1)
seen = ""
position = 0


def fail(what):
    print(f"{what}\nwhat came out: {seen!r}", file=sys.stderr)
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    sys.exit(1)


def read_some():
    global seen
    if not select.select([master], [], [], max(0, DEADLINE - time.monotonic()))[0]:
        return False
    try:
        data = os.read(master, 65536)
    except OSError:
        return False
    seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace"))
    return bool(data)


def size(rows, columns):
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    # The terminal's foreground group is told by the kernel.


master, slave = pty.openpty()
size(24, 80)
at_start = termios.tcgetattr(slave)
child = os.fork()
if child == 0:
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(slave, fd)
    os.closerange(3, 100)
    for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(sys.argv[1], sys.argv[1:])

pidfd = os.pidfd_open(child)
for line in sys.stdin:
    if not line.strip():
        continue
    action, *args = json.loads(line)
    if action == "expect":
        while (found := seen.find(args[0], position)) < 0:
            if not read_some():
                fail(f"{args[0]!r} did not come")
        position = found + len(args[0])
    elif action == "send":
        os.write(master, args[0].encode())
    elif action == "size":
        size(*args)
    elif action == "kill":
        os.kill(child, getattr(signal, args[0]))
    elif action == "end":
        while not select.select([pidfd], [], [], 0)[0]:
            if not select.select([pidfd, master], [], [], max(0, DEADLINE - time.monotonic()))[0]:
                fail("the program did not end")
            if select.select([master], [], [], 0)[0]:
                read_some()
        while select.select([master], [], [], 0)[0] and read_some():
            pass
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    elif action == "settings":
        print("settings", "same" if termios.tcgetattr(slave) == at_start else "changed")
    else:
        fail(f"unknown action {action}")
print(json.dumps(seen))
