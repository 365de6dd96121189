"""Streams: shards of a stated size, exact resume, any number of passes; and what they cannot do."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from safetensors.torch import load_file
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.batching.streams import Shards, StreamedRows, read_stream
from widemargin.trainer.errors import UserError

from tests.support.tiny_models import TOKENIZER, parameters_of, tiny_config, tiny_model, tiny_pairs
from tests.support.two_ranks import launch

READ: list[int] = []
"""Numbers of the rows that streams of this module have given since it was last cleared."""


def numbered(count: int | None = None) -> IterableDataset:
    """Pairs of which each is another; without end if ``count`` is None."""

    def rows():
        for number in itertools.count() if count is None else range(count):
            READ.append(number)
            row = tiny_pairs(1, seed=number)[0]
            yield row | {"prompt": f"{number} {row['prompt']}"}

    return IterableDataset.from_generator(rows)  # pyright: ignore[reportReturnType]


def trainer_of(folder: Path, stream: Any, **settings: Any) -> PreferenceTrainer:
    settings = {"stream_shard_size": 8, "max_steps": 5} | settings
    return PreferenceTrainer(
        tiny_model(),
        tiny_config(folder, **settings),
        train_dataset=stream,
        processing_class=TOKENIZER,
    )


def plain_shards(stream: IterableDataset, size: int) -> Shards:
    """Of rows as they are; those that say so cannot train."""

    def prepare(parts: list[Dataset], folder: str) -> Dataset:
        rows = [row for part in parts for row in part.to_list()]
        return Dataset.from_list([row for row in rows if row["trains"]])

    return Shards(stream, size, prepare)


def counted(trains: list[bool]) -> IterableDataset:
    rows = [{"number": i, "trains": each} for i, each in enumerate(trains)]
    return Dataset.from_list(rows).to_iterable_dataset()


def test_a_shard_is_filled_with_rows_that_can_train_and_from_the_beginning_again():
    shards = plain_shards(counted([True, False, True, True, False, False, True]), 3)
    found = [shards.read(n)["number"][:] for n in range(4)]
    assert [list(numbers) for numbers in found] == [[0, 2, 3], [6, 0, 2], [3, 6, 0], [2, 3, 6]]
    assert not shards.ended
    assert shards.places == {0: (0, 0), 1: (0, 4), 2: (1, 3), 3: (2, 1), 4: (2, 7)}
    again = plain_shards(shards.stream, 3)
    again.places[2] = (1, 3)
    assert list(again.read(2)["number"]) == [3, 6, 0]
    assert list(plain_shards(shards.stream, 3).read(3)["number"]) == [2, 3, 6]


def test_rows_of_several_types_are_read_as_they_are_in_a_data_set(tmp_path):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    kinds = ({}, {"tool_calls": [call]})
    rows = [{"chosen": [{"role": "assistant", "content": "", **kind}]} for kind in kinds]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream: Any = load_dataset("json", data_dir=str(tmp_path), split="train", streaming=True)
    shards = Shards(stream, 2, lambda parts, folder: parts[0])
    assert shards.read(0).to_list() == rows
    assert read_stream(stream, None).to_list() == rows


def test_a_shuffled_stream_is_shuffled_anew_in_every_pass():
    stream = counted([True] * 6).shuffle(seed=3, buffer_size=6)
    shards = plain_shards(stream, 6)
    first, second = (list(shards.read(n)["number"]) for n in range(2))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert list(shards.read(0)["number"]) == first


def test_a_stream_that_ends_in_the_first_shard_is_a_data_set(tmp_path):
    made = trainer_of(tmp_path, numbered(7), max_steps=-1, num_train_epochs=2)
    assert not isinstance(made.train_dataset, StreamedRows)
    assert len(made.train_dataset) == 7
    assert made.train().global_step == 4


def test_an_endless_stream_trains_by_shards_of_whole_steps(tmp_path):
    """As far as it is read, every shard an epoch: the first as a data set of the same rows."""
    READ.clear()
    made = trainer_of(tmp_path, numbered(), stream_shard_size=5)
    assert isinstance(made.train_dataset, StreamedRows)
    assert len(made.train_dataset) == 8  # the next number of whole steps of four
    assert max(READ) < 10
    result = made.train()
    assert result.global_step == 5
    assert 20 <= max(READ) + 1 < 28
    assert made.train_dataset.within == " in shard 2"

    alone = trainer_of(tmp_path, Dataset.from_list(list(numbered(8))), max_steps=2)
    shard = trainer_of(tmp_path, numbered(), max_steps=2)
    assert shard.train().training_loss == alone.train().training_loss
    assert torch.equal(parameters_of(shard.model), parameters_of(alone.model))


@pytest.mark.costly
@pytest.mark.parametrize("objective", ["simpo", "lmpo"])
@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_run_has_the_same_pairs(tmp_path, step, objective):
    """From within a shard, and from between two."""
    settings = {"save_strategy": "steps", "save_steps": 1, "objective": objective, "max_steps": 6}
    whole = trainer_of(tmp_path / "run", numbered(), **settings)
    whole.train()
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        if folder.name != f"checkpoint-{step}":
            shutil.rmtree(folder)
    again = trainer_of(tmp_path / "run", numbered(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert again.train_dataset.shard == 2  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(parameters_of(whole.model), parameters_of(again.model))
    assert again.state.log_history[-1]["train_loss"] == whole.state.log_history[-1]["train_loss"]


@pytest.mark.costly
def test_workers_read_the_shard_of_the_epoch(tmp_path):
    found = []
    for workers in (0, 1):
        settings = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        made = trainer_of(tmp_path / str(workers), numbered(), **settings)
        made.train()
        found.append(parameters_of(made.model))
    assert torch.equal(*found)


@pytest.mark.costly
def test_a_second_training_begins_with_the_first_shard(tmp_path):
    made = trainer_of(tmp_path, numbered(), learning_rate=0.0)
    losses = [made.train().training_loss for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.costly
def test_another_order_is_refused(tmp_path):
    orders = itertools.count()

    def rows():
        yield from tiny_pairs(40, seed=next(orders))

    stream = IterableDataset.from_generator(rows)
    made = trainer_of(tmp_path, stream)
    made.train()
    with pytest.raises(UserError, match="shard 0 of it had other rows when it was read before"):
        made.train()


REFUSED = [
    ({"max_steps": -1}, "max_steps: set it; the stream goes on after the 8 pairs"),
    ({"max_length": None}, "max_length: set it"),
    ({"precompute_ref_log_probs": True, "objective": "dpo"}, "precompute_ref_log_probs: set it to"),
    ({"max_tokens_per_micro_batch": 500}, "max_tokens_per_micro_batch: leave it out"),
    ({"stream_shard_size": 0}, "stream_shard_size: expected a whole number from 1 on"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_needs_all_pairs_is_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        trainer_of(tmp_path, numbered(), **settings)


def test_rows_of_several_pairs_are_refused_where_a_shard_would_cut_one(tmp_path):
    row = {"prompt": "a", "completions": [" yes", " no", " maybe"], "scores": [3.0, 2.0, 1.0]}
    stream = Dataset.from_list([row] * 30).to_iterable_dataset()
    with pytest.raises(UserError, match="8 rows gave 16 pairs, and a shard ends with a row"):
        trainer_of(tmp_path, stream)
    made = trainer_of(tmp_path, stream, stream_shard_size=40)
    assert len(made.train_dataset) == 60


def test_a_stream_without_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="give an IterableDataset with rows"):
        trainer_of(tmp_path, numbered(0))


def test_a_stream_that_can_be_read_once_is_refused_where_it_is_read_again(tmp_path):
    left = tiny_pairs(13).to_list()

    def rows():
        while left:
            yield left.pop(0)

    made = trainer_of(tmp_path, IterableDataset.from_generator(rows))
    with pytest.raises(UserError, match="give a stream that can be read again, or fewer max_steps"):
        made.train()


OF_TWO = """
from pathlib import Path
from tests.trainer.batching.test_streams import numbered, trainer_of
made = trainer_of(Path("two"), numbered(), per_device_train_batch_size=2, ddp_backend="gloo")
made.train()
made.save_model()
"""


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    """Each reads the stream."""
    one = trainer_of(tmp_path / "one", numbered())
    one.train()
    one.save_model()
    (tmp_path / "script.py").write_text(OF_TWO)
    done = launch(tmp_path, "script.py")
    assert done.returncode == 0, done.stderr[-2000:]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all((weights[0][k] - weights[1][k]).abs().max() < 2e-6 for k in weights[0])
