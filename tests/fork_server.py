"""Starts `edgefm` commands as processes of their own, forked from this one, which has loaded what they import: a start takes a
tenth of a second instead of ten. It computes nothing and starts no thread itself.

On every connection comes one JSON line with arguments, folder and environment, and the descriptors of stdout and stderr; back
go the process's number and, once it has ended, its return code as `subprocess` tells it.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable


def serve(path: str) -> list[str] | None:
    """Returns the arguments in each process that it forks, and None in this one once stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener, connections = socket.socket(socket.AF_UNIX), {}
    listener.bind(path)
    listener.listen(64)
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        for readable in (listener, woken, sys.stdin):
            selector.register(readable, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj == woken:
                    os.read(woken, 4096)
                    _reap(connections)
                    continue
                connection = listener.accept()[0]
                message, (out, err), _, _ = socket.recv_fds(connection, 65536, 2)
                sys.stdout.flush()
                number = os.fork()
                if not number:
                    for each in (listener, connection, *connections.values()):
                        each.close()
                    return _become(json.loads(message), out, err)
                os.close(out), os.close(err)
                connections[number] = connection
                connection.sendall(f"{number}\n".encode())


def _reap(connections: dict[int, socket.socket]) -> None:
    while connections:
        number, status = os.waitpid(-1, os.WNOHANG)
        if not number:
            return
        with connections.pop(number) as connection, contextlib.suppress(OSError):  # nobody waits for it any more
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(request: dict, out: int, err: int) -> list[str]:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out), os.close(err)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    return request["arguments"]


def _code_of(main: Callable[[], None]) -> int:
    try:
        main()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    from edgefm.deploy.cli import main

    arguments = serve(sys.argv[1])
    if arguments is not None:
        sys.argv = ["edgefm", *arguments]
        code = _code_of(main)
        # All that an exit does but the last: what gRPC leaves behind in a fork crashes when the interpreter is taken apart.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
