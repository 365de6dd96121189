"""What `preloaded.python` names: it has its arguments run by a fork, and ends as the fork does.

Started often, so ``python -I -S`` runs it, and it imports the standard library alone.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress

LOOK_AFTER_S = 1


def is_inherited(file: int) -> bool:
    try:
        return os.get_inheritable(file)
    except OSError:
        return False


def main() -> None:
    parent = os.getppid()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(os.path.join(os.path.dirname(sys.argv[0]), "socket"))
    files = [file for file in map(int, os.listdir("/proc/self/fd")) if is_inherited(file)]
    request = [sys.argv[0], sys.argv[1:], os.getcwd(), dict(os.environ), files]
    socket.send_fds(server, [json.dumps(request).encode()], files)
    fork = int(server.recv(100))
    if not fork:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(fork, number))
    server.settimeout(LOOK_AFTER_S)
    status = b""
    while os.getppid() == parent:  # an orphan ends, and its fork with it
        try:
            status = server.recv(100)
            break
        except TimeoutError:
            pass
    code = int(status or 1)
    if code < 0:
        with suppress(OSError):  # of SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
