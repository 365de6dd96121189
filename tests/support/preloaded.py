"""Python processes that need not import: forks of one that has imported everything.

A fresh process spends about 5 CPU-seconds on importing torch, transformers and the package.
`python` is the path of an executable that takes ``-c CODE``, ``-m MODULE`` or a script as
``python`` does. It passes them, its folder, variables and open files to a server, which has
imported everything, started no thread and computed nothing. The server forks, the fork runs the
program and ends as an interpreter does, and the executable (`preloaded_client`) ends with its exit
status. A fork is killed when its executable dies, and all are when the tests' process is gone.

Two things differ from a fresh process. Forks share one seed for hashes of strings; a few launches
stay fresh, `two_ranks.launch(fresh=True)`, also for that. And libraries have read some variables
already: for a caller whose variables are not those of the session's start, or who gives the
interpreter options, the executable becomes a fresh ``python`` instead.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from contextlib import suppress
from multiprocessing import spawn
from pathlib import Path
from typing import Any

MODULES = (
    "torch._dynamo", "torch.distributed.run", "accelerate.commands.launch", "peft",
    "transformers.models.llama.modeling_llama", "widemargin.trainer.train",
    "widemargin.trainer.cli", "tests.support.tiny_models",
)  # fmt: skip
READ_AT_IMPORT = (
    "CUDA_", "HF_", "KMP_", "LD_", "MKL_", "MPL", "OMP_", "PYTHON", "TOKENIZERS_", "TORCH",
    "TRANSFORMERS_", "TRITON",
)  # fmt: skip
"""Beginnings of variables that a library or the interpreter may have read before a fork."""

READ_LATER = (
    "CUDA_VISIBLE_DEVICES", "HF_DATASETS_CACHE", "PYTHONPATH", "TOKENIZERS_PARALLELISM",
    "TORCHELASTIC_", "TORCH_NCCL_",
)  # fmt: skip
"""Those among them that are read later, or that `become` applies."""

AT_START = dict(os.environ)
CLIENT = Path(__file__).with_name("preloaded_client.py")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}  # fmt: skip
"""For the server, and so for the forks of a caller who says nothing of them."""
LOOK_AFTER_S = 0.02
PR_SET_PDEATHSIG = 1


@functools.cache
def python() -> str:
    """The path of the executable; starts the server, which ends with this process."""
    folder = tempfile.mkdtemp(prefix="preloaded-")
    client = Path(folder, "python")
    client.write_text(f"#!{sys.executable} -IS\n{CLIENT.read_text()}")
    client.chmod(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.preloaded", str(listener.fileno()), *MODULES],
            cwd=CLIENT.parents[2], env=AT_START | ONE_THREAD,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for the tests
        )  # fmt: skip
    atexit.register(_end, os.getpid(), server, folder)
    return str(client)


def _end(owner: int, server: subprocess.Popen[bytes], folder: str) -> None:
    if os.getpid() == owner:  # and no process that it has forked
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def serve(listener: socket.socket) -> Any:
    """Fork for every client until the tests' process is gone; in a fork, the client's request."""
    clients: dict[int, socket.socket] = {}
    while True:
        watched = [sys.stdin, listener, *clients.values()]
        ready = select.select(watched, [], [], LOOK_AFTER_S if clients else None)[0]
        for fork, client in list(clients.items()):
            if client in ready or sys.stdin in ready:  # clients say nothing more: one is gone
                with suppress(ProcessLookupError):
                    os.killpg(fork, signal.SIGKILL)
            ended, status = os.waitpid(fork, os.WNOHANG)
            if ended:
                answer(clients.pop(fork), os.waitstatus_to_exitcode(status)).close()
        if sys.stdin in ready:
            return None
        if listener in ready:
            client, _ = listener.accept()
            message, files, *_ = socket.recv_fds(client, 2**20, 250)
            request = json.loads(message or "null")
            fork = os.fork() if request and can_run(*request[1:4:2]) else None
            if fork == 0:
                for each in (listener, client, *clients.values()):
                    each.close()
                return [*request, files]
            for file in files:
                os.close(file)
            if fork:
                clients[fork] = client
            answer(client, fork or 0)


def answer(client: socket.socket, number: int) -> socket.socket:
    with suppress(OSError):  # it is gone
        client.send(b"%d" % number)
    return client


def can_run(arguments: list[str], variables: dict[str, str]) -> bool:
    """Whether a fork does as a fresh process would: some imports have set variables, too."""
    first = next((a for a in arguments if a not in ("-B", "-u")), "-")
    names = {n for n in AT_START | variables if n.startswith(READ_AT_IMPORT)}
    return (first in ("-c", "-m") or first[0] != "-") and all(
        name.startswith(READ_LATER)
        or (name in ONE_THREAD and name not in variables)
        or variables.get(name) in (AT_START.get(name), os.environ.get(name))
        for name in names
    )


def become(
    executable: str, arguments: list[str], folder: str, variables: dict[str, str],
    numbers: list[int], files: list[int],
) -> None:  # fmt: skip
    """Run the program in this fork, with ``files`` opened by the ``numbers`` they had."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # with the server
    free = 1 + max(numbers)
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, free) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.executable = executable  # so that processes that the fork starts are forks, too
    spawn.set_executable(executable)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # of TMPDIR
    if "datasets.config" in sys.modules:
        importlib.reload(sys.modules["datasets.config"])  # reads HF_DATASETS_CACHE
    while arguments[0] in ("-B", "-u"):
        if arguments.pop(0) == "-B":
            sys.dont_write_bytecode = True
        elif isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)
    option = arguments.pop(0) if arguments[0] in ("-c", "-m") else ""
    place = {"-c": "", "-m": folder}.get(option, os.path.dirname(os.path.abspath(arguments[0])))
    old, new = (given.get("PYTHONPATH") for given in (AT_START, variables))
    kept = [path for path in sys.path[1:] if path not in (old or "").split(os.pathsep)]
    added = [path or folder for path in new.split(os.pathsep)] if new else []  # "": this folder
    sys.path[:] = [place, *dict.fromkeys([*added, *kept])]
    program = arguments[0]
    sys.argv[:] = [option, *arguments[1:]] if option == "-c" else arguments
    if option == "-m":
        sys.modules.pop(program, None)
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.modules["__main__"] = space = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(space))
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    number, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the other threads"
    gc.freeze()
    request = serve(socket.socket(fileno=int(number)))
    if request is not None:
        become(*request)
