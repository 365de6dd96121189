"""What `sequence_parallel_size` cannot split is refused, with a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.batching.images import run_processor
from widemargin.trainer.errors import UserError
from widemargin.trainer.packing import PairCollator
from widemargin.trainer.packing.choose import Packing
from widemargin.trainer.packing.split import check_split, over_ranks
from widemargin.trainer.parallel.groups import Place

from tests.support.packed_rows import family_model
from tests.support.tiny_models import TOKENIZER, tiny_config, tiny_model, tiny_pairs, tiny_trainer

CONFIG: Any = tiny_model().config


def args_of(tmp_path, size: Any = 2, **settings: Any) -> Any:
    return tiny_config(tmp_path, sequence_parallel_size=size, **settings)


@pytest.mark.parametrize(
    ("settings", "config", "ranks", "remedy"),
    [
        ({}, CONFIG, 3, "start a multiple of 2 processes"),
        ({"size": 3}, CONFIG, None, "set it to a divisor of the model's 4 attention heads"),
        ({"packing": "padded"}, CONFIG, 2, "^packing: set auto; .*no padded rows"),
        ({"attn_implementation": "eager"}, CONFIG, 2, "^attn_implementation: set sdpa or flash"),
        (
            {"include_num_input_tokens_seen": "all"},
            CONFIG,
            2,
            "^include_num_input_tokens_seen: set",
        ),
        ({}, family_model("bamba").config, 2, "bamba has recurrent layers"),
        ({}, family_model("mamba").config, 2, "mamba has recurrent layers"),
    ],
    ids=["ranks", "heads", "padded", "eager", "tokens seen", "hybrid", "recurrent"],
)
def test_each_obstacle_has_a_remedy(tmp_path, settings, config, ranks, remedy):
    with pytest.raises(UserError, match=remedy):
        check_split(args_of(tmp_path, **settings), config, ranks)
    settings["size"] = 1
    check_split(args_of(tmp_path, **settings), config, ranks)


def test_torch_compile_is_refused(tmp_path):
    args = args_of(tmp_path)
    args.torch_compile = True
    with pytest.raises(UserError, match=r"^torch_compile: set it to false"):
        check_split(args, CONFIG, 2)


def test_what_splits_passes(tmp_path):
    check_split(args_of(tmp_path, attn_implementation="sdpa"), CONFIG, 4)
    check_split(args_of(tmp_path, size=4), CONFIG, None)


@pytest.mark.parametrize("size", [0, 1.5, True])
def test_sizes_that_make_no_sense(tmp_path, size):
    with pytest.raises(UserError, match=r"^sequence_parallel_size: expected a whole number"):
        args_of(tmp_path, size=size)


@pytest.mark.parametrize(("layout", "rows"), [("padded", "dense"), ("packed", "dense")])
def test_other_rows_are_refused_with_their_reason(layout, rows):
    with pytest.raises(UserError, match=rf"{layout} \(sdpa in float32: dense masks\)$"):
        over_ranks(Packing(layout, rows, "sdpa in float32: dense masks"), Place(0, 2))


def test_a_packing_says_that_its_rows_are_split():
    packing = Packing("packed", "varlen", "no padding")
    assert over_ranks(packing, None) is packing
    split = over_ranks(packing, Place(1, 2))
    assert str(split) == "packing: packed (no padding), each row over 2 ranks"
    assert split.collator(0).place == Place(1, 2)


def test_one_process_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="start a multiple of 2 processes"):
        tiny_trainer(tmp_path, sequence_parallel_size=2)


def test_own_collators_and_images_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="leave out rows with images"):
        run_processor(TOKENIZER, args_of(tmp_path), args_of(tmp_path).build_objective())
    monkeypatch.setattr("widemargin.trainer.trainer.check_split", lambda *_: None)
    with pytest.raises(UserError, match="leave out data_collator"):
        PreferenceTrainer(
            tiny_model(),
            args_of(tmp_path),
            tiny_pairs(4),
            processing_class=TOKENIZER,
            data_collator=PairCollator(0),
        )


def test_groups_of_ranks_count_as_one(tmp_path, monkeypatch):
    args = args_of(tmp_path)
    for name, value in (("world_size", 6), ("process_index", 3)):
        monkeypatch.setattr(type(args), name, property(lambda _, value=value: value))
    assert (args.data_parallel_size, args.data_parallel_rank) == (3, 1)
    assert args.pairs_per_step == 3 * 4
    assert Place.of(args) == Place(1, 2, args.ddp_timeout)
    assert args.head_settings["place"] == Place.of(args)
    assert Place.of(args_of(tmp_path, size=1)) is None


def test_a_batch_tells_which_targets_are_this_ranks():
    batch = PairCollator(0, layout="packed", rows="varlen", place=Place(0, 2))(
        [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}]
    )
    assert batch["own_targets"].tolist() == [1]  # positions 1, 4 and 5 predict
    assert batch["select"][batch["own_targets"]].tolist() == [4]
    assert isinstance(batch["own_targets"], torch.Tensor)
