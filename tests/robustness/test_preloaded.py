"""Forks of a preloaded process end, fail and die as fresh processes do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.support.preloaded import python
from tests.support.two_ranks import launch

pytestmark = pytest.mark.costly

SHOWING = """
import json, os, sys
print(json.dumps([
    __name__, sys.argv, sys.path, os.getcwd(), os.environ["GIVEN"], sys.stdin.read(),
    len(os.listdir("/proc/self/task")),
]))
print("an error", file=sys.stderr)
sys.exit(3)
"""
# Short sleeps: a signal just before a long one would wait for its end.
WAITING = "import os, time\nprint(os.getpid(), flush=True)\nfor _ in range(600): time.sleep(0.1)"


def run(*arguments: str, interpreter: str | None = None, **given: Any) -> Any:
    variables = os.environ | given.pop("variables", {})
    command = [interpreter or python(), *arguments]
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=60, **given
    )


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def dies(process: int) -> bool:
    """Soon: an executable looks once a second whether it is an orphan."""
    end = time.monotonic() + 10
    while time.monotonic() < end and is_running(process):
        time.sleep(0.02)
    return not is_running(process)


@pytest.mark.parametrize(
    "form", [["-c", SHOWING], ["-m", "shown"], ["shown.py"], ["-u", "shown.py"]]
)
def test_a_program_is_run_as_a_fresh_process_runs_it(form, tmp_path):
    (tmp_path / "shown.py").write_text(SHOWING)
    variables = {
        "GIVEN": "é",
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "more"), os.environ.get("PYTHONPATH", "")]),
    }
    done, expected = (
        run(*form, "--a", "b c", interpreter=each, cwd=tmp_path, input="in", variables=variables)
        for each in (python(), sys.executable)
    )
    assert done.stdout == expected.stdout
    assert (done.returncode, done.stderr) == (3, "an error\n")


def test_a_fork_has_imported_everything_and_nothing_has_begun():
    code = (
        "import os, sys; before = {*sys.modules}\n"
        "import widemargin.trainer.train, torch, transformers.models.llama.modeling_llama\n"
        "print({*sys.modules} - before, torch.cuda.is_initialized(), torch.cuda.is_available())\n"
        "print(len(os.listdir('/proc/self/task')), torch.distributed.is_initialized())\n"
    )
    done = run("-c", code, variables={"CUDA_VISIBLE_DEVICES": ""})
    assert done.stdout == "set() False False\n1 False\n", done.stderr


@pytest.mark.parametrize(
    ("options", "variables"),
    [([], {"OMP_NUM_THREADS": "2"}), ([], {"PYTHONHASHSEED": "7"}), (["-I"], {})],
)
def test_what_a_fork_cannot_take_over_makes_a_fresh_process(options, variables):
    done = run(*options, "-c", "import sys; print('torch' in sys.modules)", variables=variables)
    assert done.stdout == "False\n", done.stderr


def test_variables_that_are_read_later_are_taken_over(tmp_path):
    code = "import sys; print('torch' in sys.modules)\nfrom datasets import config\n"
    code += "import tempfile; print(config.HF_DATASETS_CACHE, tempfile.gettempdir())"
    given = {"HF_DATASETS_CACHE": "elsewhere", "TMPDIR": str(tmp_path)}
    done = run("-c", code, variables=given)
    assert done.stdout == f"True\nelsewhere {tmp_path}\n", done.stderr


def test_a_fork_serves_a_worker_that_has_run_the_command_line():
    """`main` sets the variable in its own process, and so for a test that calls it."""
    code = "import os, sys; print('torch' in sys.modules, os.environ['TOKENIZERS_PARALLELISM'])"
    done = run("-c", code, variables={"TOKENIZERS_PARALLELISM": "true"})
    assert done.stdout == "True true\n", done.stderr


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("import os; os.abort()", -6, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("import atexit; atexit.register(print, 'last')", 0, ""),
    ],
)
def test_it_ends_as_the_fork_does(code, status, said):
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (status, said)
    assert done.stdout == "last\n" * ("atexit" in code)


def test_a_crash_has_its_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("def f():\n    return {}['missing']\n\nf()\n")
    done = run("broken.py", cwd=tmp_path)
    assert done.returncode == 1
    assert 'broken.py", line 2, in f\n    return {}[' in done.stderr
    assert done.stderr.endswith("KeyError: 'missing'\n")


def test_a_signal_reaches_the_fork():
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n" + WAITING
    with subprocess.Popen([python(), "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(60) == 7


def test_a_fork_dies_with_its_executable():
    """And so do forks that a fork has started, as ranks are by torchrun."""
    inner = f"import subprocess\nsubprocess.run([{python()!r}, '-c', {WAITING!r}])"
    for code in (WAITING, inner):
        with subprocess.Popen([python(), "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            fork = int(process.stdout.readline())
            assert is_running(fork)
            process.kill()
            assert dies(fork)


def test_forks_die_with_the_tests(tmp_path):
    code = (
        "import subprocess, sys\n"
        "from tests.support import preloaded\n"
        "preloaded.MODULES = ()\n"
        f"subprocess.Popen([preloaded.python(), '-c', {WAITING!r}])\n"
        "sys.stdin.read()\n"
    )
    given = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [python(), "-c", code], env=os.environ | given, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as tests:  # fmt: skip
        assert tests.stdout is not None
        fork = int(tests.stdout.readline())
        tests.send_signal(signal.SIGKILL)
        assert dies(fork)


@pytest.mark.usefixtures("preloaded")
def test_a_spawned_process_is_a_fork():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(os.getppid).result(60) != os.getpid()


def test_ranks_are_forks_and_one_that_fails_ends_the_other(tmp_path):
    (tmp_path / "ranks.py").write_text(
        "import json, os, sys, time\n"
        "names = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS'\n"
        "rank = os.environ['RANK']\n"
        "told = ['torch._dynamo' in sys.modules, *(os.environ[name] for name in names)]\n"
        "open(rank, 'w').write(json.dumps(told))\n"
        "while not os.path.exists('0') or not os.path.exists('1'): time.sleep(0.01)\n"
        "if rank == '1': raise ValueError('of rank 1')\n"
        "for _ in range(600): time.sleep(0.1)\n"
    )
    begin = time.monotonic()
    done = launch(tmp_path, "ranks.py")
    assert time.monotonic() - begin < 40
    assert done.returncode == 1
    assert "ValueError: of rank 1" in done.stderr
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == [True, rank, rank, "2", "1"]


def test_a_process_that_the_tests_fork_ends_alone():
    """Its exit functions are the tests', and leave the server and its folder."""
    code = (
        "import os, sys\n"
        "from tests.support.preloaded import python\n"
        "path, child = python(), os.fork()\n"
        "if not child: sys.exit()\n"
        "os.waitpid(child, 0)\n"
        "print(os.path.exists(path))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr
