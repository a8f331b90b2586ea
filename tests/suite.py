#!/usr/bin/env python3
"""Runs one test executable under a time limit and counts. It speaks as libtest does; `skipped: REASON`
as a result and a time after one are understood too.

    suite.py LABEL LIMIT TALLY -- COMMAND...

Passes its output through. At the limit it kills everything the executable started and names
the tests that had no result yet. Appends `passed failed skipped` to the file TALLY; tests that
left with a reason (tests/common `skip!`) wrote it to the file $ROOTLET_TEST_SKIPS.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time

RESULT = re.compile(
    r"^test (?P<name>.+?) (?:- should panic )?\.\.\. (?P<result>ok|FAILED|ignored|skipped)(?P<more>[ :,].*)?$"
)


def main():
    label, limit, tally, separator, *command = sys.argv[1:]
    assert separator == "--", __doc__
    # A background job or nohup(1) above us ignores some, and what is ignored is inherited by the tests.
    for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_DFL)
    names = list_tests(command)
    skips_file = os.environ.get("ROOTLET_TEST_SKIPS")
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    hung = threading.Event()

    def end():
        hung.set()
        kill_session(process.pid)

    timer = threading.Timer(float(limit), end)
    timer.start()
    results = {}
    for line in process.stdout:
        text = line.decode(errors="backslashreplace")
        if match := RESULT.match(text.rstrip("\n")):
            results[match["name"]] = match["result"]
            if match["result"] in ("ok", "ignored"):
                continue
        elif text.startswith(("running ", "test result: ", "\n")):
            continue
        sys.stdout.write(f"  {text}")
        sys.stdout.flush()
    status = process.wait()
    timer.cancel()

    skips = []
    if skips_file and os.path.exists(skips_file):
        with open(skips_file) as file:
            skips = [line.rstrip("\n") for line in file]
        os.unlink(skips_file)
    ignored = sum(result in ("ignored", "skipped") for result in results.values())
    failed = [name for name, result in results.items() if result == "FAILED"]
    running = [name for name in names if name not in results] if status else []
    if hung.is_set():
        print(f"  {label}: no end within {limit} s; without a result: {', '.join(running) or 'none'}")
    elif running:
        print(f"  {label}: ended with {status}; without a result: {', '.join(running)}")
    for skip in skips:
        print(f"  skipped: {skip}")
    bad = max(len(failed) + len(running), 1 if status else 0)
    passed = sum(result == "ok" for result in results.values()) - len(skips)
    took = time.monotonic() - started
    print(f"{label}: {passed} ok, {bad} not, {ignored + len(skips)} left out, {took:.0f} s", flush=True)
    with open(tally, "a") as file:
        file.write(f"{passed} {bad} {ignored + len(skips)}\n")
    return 1 if bad else 0


def list_tests(command):
    listing = subprocess.run(
        [*command, "--list", "--format", "terse"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    return [line[: -len(": test")] for line in listing.stdout.splitlines() if line.endswith(": test")]


def kill_session(session):
    """Everything the executable started, whatever group it made: its session, then what that leaves."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.getsid(int(entry)) == session and int(entry) != session:
                    os.kill(int(entry), signal.SIGKILL)
            except OSError:
                pass
    try:
        os.killpg(session, signal.SIGKILL)
    except OSError:
        pass


sys.exit(main())
