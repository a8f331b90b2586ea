#!/usr/bin/env python3
"""kill-at.py LINE OUTPUT COMMAND…

Runs COMMAND with its output in the file OUTPUT, and kills it with SIGKILL when it has printed LINE
lines (0: never). Then waits until everything that it started has ended: as a subreaper this
process becomes the parent of whatever loses its own. Prints the number of lines seen and the
line it was killed at. Fails if something is still there a minute later, or if COMMAND was to be
killed and ended before.
"""

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36


def too_late(_signal, _frame):
    left = subprocess.run(["ps", "-eo", "pid,ppid,user,stat,wchan:24,args"], capture_output=True, text=True)
    sys.exit(f"a minute after the kill there are still processes:\n{left.stdout}")


def main():
    at, output, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit("cannot become a subreaper")
    seen, where = 0, b""
    run = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with open(output, "wb") as log:
        # The end of file comes when the last process inside has let go of the pipe.
        for line in run.stdout:
            log.write(line)
            seen += 1
            if seen == at:
                run.kill()
                where = line
                signal.signal(signal.SIGALRM, too_late)
                signal.alarm(60)
    status = run.wait()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    signal.alarm(0)
    print(f"{seen} {where.decode(errors='replace').strip()[:60]}")
    wanted = -signal.SIGKILL if at else 0
    if status != wanted:
        sys.exit(f"it ended with {status} after {seen} lines, not with {wanted}")


main()
