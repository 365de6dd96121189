"""Kill a training at seeded random moments, go on from what is left, and compare with a whole run.

    python -m bench.torture --kills 30 --ranks 1

A moment is one event of one kind (a step, a save, an evaluation): a callback of the training loop,
or a file opened, renamed or removed in the output folder. The process tells this one when it gets
there and is killed (SIGKILL) up to a few milliseconds later. After every kill each checkpoint must
be whole, and every run that gets to its end must have the weights of the one never stopped: bit for
bit on one process, within 1e-6 on two. Processes are forks of this one, which spares the imports.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("step", "save", "evaluate")
TIMEOUT_S = 120
SETTINGS = """\
{model_name_or_path: ./model, dataset: train.jsonl, eval_dataset: test.jsonl, objective: lmpo,
 optim: adamw_torch, learning_rate: 0.001, lr_scheduler_type: cosine, max_steps: 8,
 per_device_train_batch_size: %d, gradient_accumulation_steps: 2, eval_strategy: steps,
 eval_steps: 3, save_steps: 2, save_total_limit: 2, logging_steps: 4, use_cpu: true,
 write_report: false, disable_tqdm: true, resume_from_checkpoint: auto, ddp_backend: %s}
"""


@dataclass(frozen=True)
class Moment:
    """The ``count``-th event of a kind in one rank's process, and how long after it."""

    phase: str
    count: int
    rank: int
    delay_s: float


class Events:
    """Counts the events of this process, and tells the parent when the moment has come."""

    def __init__(self, folder: Path, moment: Moment | None, pipe: int) -> None:
        self.folder, self.moment, self.pipe = str(folder.resolve()), moment, pipe
        self.counts: Counter[str] = Counter()

    def __call__(self, phase: str) -> None:
        self.counts[phase] += 1
        if self.moment is not None and (phase, self.counts[phase]) == (
            self.moment.phase, self.moment.count,
        ):  # fmt: skip
            os.write(self.pipe, b"x")

    def audit(self, event: str, args: Any) -> None:
        if event == "open":
            written = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if not written or not isinstance(args[0], str | os.PathLike):
                return
        elif event not in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            return
        if isinstance(args[0], str | os.PathLike) and self.folder in os.path.abspath(args[0]):
            self("save")


def train_here(place: Path, folder: Path, ranks: int, events: Events) -> None:
    """One process' training in ``folder``, from whatever is there."""
    from transformers import TrainerCallback
    from widemargin.trainer.config_file import load_config
    from widemargin.trainer.run import train
    from widemargin.trainer.trainer import PreferenceTrainer

    class Telling(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            events("step")

        on_substep_end = on_pre_optimizer_step = on_optimizer_step = on_step_end = on_step_begin

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            events("evaluate")

        on_evaluate = on_prediction_step

    original = PreferenceTrainer.train

    def telling(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Telling())
        return original(self, *args, **kwargs)

    PreferenceTrainer.train = telling
    os.chdir(place)
    sys.addaudithook(events.audit)
    train(load_config(place / f"config-{ranks}.yaml", [f"--output_dir={folder}"]))


def fork(
    place: Path, folder: Path, rank: int, ranks: int, port: int, moment: Moment | None
) -> tuple[int, int]:
    """A process that trains; its id, and the pipe on which it tells of the moment."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        log = os.open(f"{folder}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if ranks > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        own = moment if moment is not None and moment.rank == rank else None
        train_here(place, folder, ranks, Events(folder, own, writing))
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def run(place: Path, folder: Path, ranks: int, moment: Moment | None) -> bool:
    """Train until the end (True) or the moment (False, all killed)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork(place, folder, rank, ranks, port, moment) for rank in range(ranks)]
    watched = children[moment.rank if moment else 0]
    if not select.select([watched[1]], [], [], TIMEOUT_S)[0]:
        for child, _ in children:
            os.kill(child, signal.SIGKILL)
        raise SystemExit(f"{folder}: no end after {TIMEOUT_S} s")
    told = os.read(watched[1], 1)
    if told:
        assert moment is not None
        time.sleep(moment.delay_s)
        os.kill(watched[0], signal.SIGKILL)
        time.sleep(0.01 * (ranks > 1))
    for child, _ in children if told else ():
        if child != watched[0]:
            os.kill(child, signal.SIGKILL)
    statuses = [os.waitpid(child, 0)[1] for child, _ in children]
    for _, pipe in children:
        os.close(pipe)
    if not told and any(statuses):
        tail = Path(f"{folder}.log").read_text()[-3000:]
        raise SystemExit(f"a run failed by itself, statuses {statuses}:\n{tail}")
    return not told


def prepare(place: Path) -> None:
    """A tiny model and pairs for it."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny_models import (  # pyright: ignore[reportMissingImports]
        TOKENIZER,
        tiny_model,
        tiny_pairs,
    )

    tiny_model().save_pretrained(place / "model")
    TOKENIZER.save_pretrained(place / "model")
    tiny_pairs(13).to_json(place / "train.jsonl")
    tiny_pairs(5, seed=1).to_json(place / "test.jsonl")
    for ranks in (1, 2):
        backend = "null" if ranks == 1 else "gloo"
        (place / f"config-{ranks}.yaml").write_text(SETTINGS % (4 // ranks, backend))


def apart(one: Path, two: Path) -> float:
    """The largest difference of two models' weights; 0 just if they are equal bit for bit."""
    from safetensors.torch import load_file

    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def torture(place: Path, kills: int, ranks: int, seed: int) -> None:
    from widemargin.trainer.checkpoints import newest_complete

    generator = random.Random(seed)
    whole, folder = place / "whole", place / "run-0"
    assert run(place, whole, ranks, None)
    done, finished, worst, seen = 0, 0, 0.0, Counter()
    while True:
        phase = PHASES[done % len(PHASES)]
        most = {"step": 16, "save": 30, "evaluate": 5}[phase]
        moment = Moment(
            phase, generator.randint(1, most), generator.randrange(ranks),
            generator.choice([0.0, 0.0005, 0.003]),
        )  # fmt: skip
        ended = run(place, folder, ranks, moment if done < kills else None)
        if not ended:
            done += 1
            seen[phase] += 1
            broken = newest_complete(folder)[1]
            if broken:
                raise SystemExit(f"after {moment}: {broken}")
            continue
        finished += 1
        worst = max(worst, apart(folder, whole))
        if worst > (0.0 if ranks == 1 else 1e-6):
            raise SystemExit(f"{folder}: weights differ by {worst:.3g} from {whole}")
        if done >= kills:
            break
        folder = place / f"run-{finished}"
    counts = ", ".join(f"{seen[phase]} in {phase}" for phase in PHASES)
    print(
        f"{done} kills on {ranks} process(es) ({counts}); {finished} runs came to their end, "
        f"weights at most {worst:.3g} from the uninterrupted run's",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder).resolve()
            os.environ["HF_DATASETS_CACHE"] = str(place / "cache")
            import widemargin.trainer.run  # noqa: F401 (forks need not import it again)

            preparing = os.fork()  # this process starts no threads, which a fork would lack
            if not preparing:
                prepare(place)
                os._exit(0)
            assert os.waitpid(preparing, 0)[1] == 0
            torture(place, options.kills, ranks, options.seed)


if __name__ == "__main__":
    main()
