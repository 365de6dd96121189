"""Images in rows: where they may come from, the tokens that stand for them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, Features, Image, List, Value
from widemargin.trainer.batching.streams import read_stream
from widemargin.trainer.data import DataSettings, load_pairs, tokenize_pairs
from widemargin.trainer.data.images.columns import decoded
from widemargin.trainer.data.images.processor import image_key
from widemargin.trainer.data.rows import RowProblem
from widemargin.trainer.data.table import PairRows
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import bot, user
from tests.support.tiny_images import image_processor, image_rows, picture
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
ROW = {"prompt": [user("What is it?")], "chosen": [bot("yes")], "rejected": [bot("no")]}


def tokenizer(family: str = "llava") -> Any:
    processor = image_processor(family)
    processor.tokenizer.processor = processor
    return processor.tokenizer


def made(rows: list[dict[str, Any]], family: str = "llava", **settings: Any) -> Any:
    return tokenize_pairs(Dataset.from_list(rows), tokenizer(family), DataSettings(**settings))


def prompts(rows: list[dict[str, Any]], family: str = "llava") -> list[str]:
    return tokenizer(family).batch_decode(made(rows, family)[0]["prompt_ids"][:])


def embedded(*images: bytes) -> list[dict[str, Any]]:
    return [{"bytes": image, "path": None} for image in images]


def test_an_images_tokens_are_counted():
    table, _ = made(image_rows(2), "qwen2_vl")
    text = tokenizer("qwen2_vl").batch_decode(table["prompt_ids"][:])
    counts = [[part.count("<|image_pad|>") for part in t.split("<|vision_start|>")] for t in text]
    assert counts == [[0, 4], [0, 6, 4]]
    assert PairRows(table).lengths.prompt.tolist() == [len(ids) for ids in table["prompt_ids"]]


def test_images_come_before_a_text_that_has_no_place_for_them():
    """As in TRL, whose column may also be one image."""
    placed = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    row = ROW | {"prompt": [user(placed)], "images": embedded(picture(0))}
    single = {**ROW, "image": embedded(picture(0))[0]}
    plain_bytes = {**ROW, "images": [picture(0)]}
    [expected] = prompts([row])
    assert "<|user|>\n<|image_pad|><|image_pad|><|image_pad|><|image_pad|>What" in expected
    assert prompts([single]) == prompts([plain_bytes]) == [expected]


@pytest.mark.parametrize("form", ["text", "parts"])
def test_marks_in_the_text_are_places_of_images(form):
    """As in LLaMA-Factory, ms-swift and LLaVA."""
    text = "<image>\nWhat is it, and <image>?"
    said = text if form == "text" else [{"type": "text", "text": text}]
    places = [{"type": "image"}, {"type": "text", "text": "\nWhat is it, and "},
              {"type": "image"}, {"type": "text", "text": "?"}]  # fmt: skip
    two = {"images": embedded(picture(0), picture(1))}
    rows = [ROW | {"prompt": [user(content)], **two} for content in (said, places)]
    one, other = (prompts([row]) for row in rows)
    assert one == other
    with pytest.raises(UserError, match="differ in number"):
        made([rows[0] | {"images": embedded(picture(0))}])


def test_a_stream_of_images_is_read_as_it_is_stored():
    stored = read_stream(Dataset.from_list(image_rows(2)).to_iterable_dataset(), None)
    assert tokenize_pairs(stored, tokenizer())[0]["images"] == made(image_rows(2))[0]["images"]


def test_pil_images_and_rows_without_any_beside_them():
    shown = Dataset.from_list([{**ROW, "images": [decoded(picture(0))]}, {**ROW, "images": []}])
    table, report = tokenize_pairs(shown, tokenizer())
    assert [len(images) for images in table["images"]] == [1, 0]
    assert report.skipped == {}
    assert "read as" not in " ".join(report.sources[0].notes)


@pytest.mark.parametrize("value", ["cat.png", "http://127.0.0.1:9/cat.png", "/etc/passwd"])
def test_no_row_names_what_is_opened(tmp_path: Path, value: str):
    with pytest.raises(UserError, match="put the images themselves into its column images"):
        made([{**ROW, "images": [value]}])
    cell = {"bytes": None, "path": value}
    with pytest.raises(UserError, match="put the images themselves"):
        made([{**ROW, "images": [cell]}])
    for kind, cells in ((Image(), cell), (List(Image()), [cell])):
        text = List({"role": Value("string"), "content": Value("string")})
        features = Features(dict.fromkeys(ROW, text) | {"image": kind})
        data = Dataset.from_dict({n: [v] for n, v in ROW.items()} | {"image": [cells]}, features)
        parquet.write_table(data.data.table, tmp_path / "named.parquet")  # datasets opens them
        with pytest.raises(UserError, match="put the images themselves"):
            load_pairs(DataSettings(str(tmp_path / "named.parquet")), tokenizer())


def test_other_media_are_refused():
    for column in ("videos", "audio", "Images", "pixel_values"):
        with pytest.raises(UserError, match=f"has {column}"):
            made([{**ROW, column: [1]}])
    grouped = {"prompt": "a", "response": "b", "helpfulness": 1, "images": embedded(picture(0))}
    with pytest.raises(UserError, match="has images"):
        made([grouped])


def test_rows_whose_images_have_no_place_are_skipped():
    image, shown = embedded(picture(0)), [{"type": "image"}, {"type": "text", "text": "Well?"}]
    good = {**ROW, "prompt": [user(shown)], "images": image}
    bad = [
        good | {"images": image * 2},
        good | {"images": []},
        good | {"chosen": [bot(shown)]},
        good | {"prompt": [user([*shown, {"type": "text", "text": "<|image_pad|>"}])]},
        good | {"images": embedded(b"no image")},
        good | {"chosen": [bot("a"), user("b"), bot("c")]},
    ]
    text = Value("string")
    parts = List({"role": text, "content": List({"type": text, "text": text})})
    rows = [
        row | {name: [m | {"content": _parts(m["content"])} for m in row[name]] for name in ROW}
        for row in [good, *bad]
    ]
    features = Features({**dict.fromkeys(ROW, parts), "images": List(Image(decode=False))})
    table, report = tokenize_pairs(Dataset.from_list(rows, features=features), tokenizer())
    assert len(table) == 1
    assert report.skipped == {
        "images and their places in the prompt differ in number": 2,
        "content that is not text": 2,
        "an image that cannot be read": 1,
        "images before an answer of several turns": 1,
    }


def _parts(content: Any) -> Any:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def test_a_prompt_with_images_is_not_cut():
    table, report = made(image_rows(2), max_prompt_length=20)
    assert len(table) + report.skipped["a prompt with images over the limits, which none is cut to"]
    assert all(ids.count(ids[0]) for ids in table["prompt_ids"])
    with pytest.raises(UserError, match="none of 2 rows can train"):
        made(image_rows(2), max_prompt_length=5)


def test_a_prompt_is_another_one_where_its_image_is():
    rows = [{**ROW, "images": embedded(picture(seed))} for seed in (0, 1, 0)]
    rows[2]["rejected"] = [bot("maybe")]
    table, _ = made(rows)
    assert PairRows(table, group_by_prompt=True).trees.tree.tolist() == [0, 1, 0]
    assert image_key([b"a", b"b"]) != image_key([b"ab"]) != image_key([])


def test_a_model_of_text_refuses_images():
    with pytest.raises(UserError, match="images: "):
        tokenize_pairs(Dataset.from_list(image_rows(1)), tiny_tokenizer())
    with pytest.raises(UserError, match="score: set it to completion"):
        made(image_rows(1), score="answer")


def test_what_is_not_an_image_starts_no_reader():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for spoilt in (postscript, b"", picture(0)[:40], b"GIF89a"):
        with pytest.raises(RowProblem, match="cannot be read"):
            decoded(spoilt)
