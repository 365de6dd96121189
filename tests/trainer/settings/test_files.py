"""YAML as others write it: huge, deep, cut off, and with secrets in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation.settings import answer_settings
from widemargin.trainer.settings.files import load_config, parse_overrides, parse_yaml, read_yaml

SECRET = "hf_SECRETsecret1234"


def bomb() -> str:
    first = "&a0 [" + ",".join(["lol"] * 10) + "]"
    rest = (f"&a{i} [" + ",".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 10))
    return "[" + ", ".join([first, *rest]) + "]"


@pytest.mark.parametrize(
    "value",
    [
        bomb(), "&a [*a]", "[" * 5000 + "]" * 5000, "{a: " * 5000 + "1" + "}" * 5000,
        "[" * 60 + "]" * 60, "1" + "0" * 400, "0x" + "f" * 5000, '!!bool "abc"', "2024-02-30",
        "!!python/object:os.system x", "!!int x", "*nobody", "a: b: c", '"open', "@x", "a\0b",
        "!!timestamp x", "!!binary é", "? [a]\n: 1", "!!float x", "<<: 1",
    ],
    ids=lambda value: value[:12],
)  # fmt: skip
def test_bad_yaml_is_refused_at_once(tmp_path, value):
    path = tmp_path / "c.yaml"
    path.write_text(f"objective: simpo\noutput_dir: {tmp_path}\nbeta: {value}\n")
    with pytest.raises(UserError):
        load_config(path)
    with pytest.raises(UserError):
        load_config(path, [f"--beta={value}"])


@pytest.mark.parametrize("text", ["\tbeta: 2", "beta:\t2", '{\n\t"beta": 2}'])
def test_tabs_are_said(text):
    with pytest.raises(ValueError, match=r"^write spaces in place of the tab \(line \d"):
        parse_yaml(text)


@pytest.mark.parametrize("key", ["beta", "learning_rate", "max_steps"])
@pytest.mark.parametrize("value", ["9" * 5000, "1e999999999999", [["x" * 9000] * 999]])
def test_huge_values_are_refused_in_few_words(key, value):
    from widemargin.trainer.settings.files import build_config

    with pytest.raises(UserError) as caught:
        build_config({"objective": "simpo", key: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        f"hub_token: x\nhub_token: {SECRET}", f"hub_token: {SECRET}: ", f'hub_token: "{SECRET}',
        f"hub_token: *{SECRET}", f"hub_token: !{SECRET} x", f"hub_token: @{SECRET}",
        f"hub_token: [{SECRET}", f"hub_token: !!int {SECRET}",
        f"hub_token: [{SECRET}]",
    ],
)  # fmt: skip
def test_no_error_repeats_what_may_be_a_secret(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(f"objective: simpo\n{text}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        f"--my_token=@{SECRET}", f"--hub_token:{SECRET}", f"--hub_token {SECRET}",
        f"--my_token=*{SECRET}", f"-hub_token={SECRET}", f'--my_token="{SECRET}',
    ],
)  # fmt: skip
def test_no_argument_is_repeated(argument):
    with pytest.raises(UserError) as caught:
        parse_overrides([argument])
    assert SECRET not in str(caught.value)


def test_anchors_that_stay_small_are_read():
    assert parse_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[0]['content'] }}", "{% for m in messages %}", "<s>{% for m %}\n  x", "1234",
        "0123", "1e5", "yes", "2026-01-31", "a #2", "a: b", "@a", "%a", "[a]", '"a" or b',
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["output_dir", "chat_template", "model_revision"])
def test_text_on_the_command_line_is_taken_as_it_stands(name, text):
    assert parse_overrides([f"--{name}={text}"]) == {name: text}


def test_quotes_and_null_are_read_as_yaml_also_where_text_is_expected():
    assert parse_overrides(["--run_name='1'", '--chat_template="a\\nb"', "--hub_token=null"]) == {
        "run_name": "1",
        "chat_template": "a\nb",
        "hub_token": None,
    }
    assert parse_overrides(["--run_name=''"]) == {"run_name": ""}
    with pytest.raises(UserError, match=r"--run_name=: give a value, or --run_name=null"):
        parse_overrides(["--run_name="])


def test_a_value_may_follow_its_name():
    given = ["--beta", "2.5", "--alpha", "-1", "--run_name", "a=b", "--seed=3"]
    expected = {"beta": 2.5, "alpha": -1, "run_name": "a=b", "seed": 3}
    assert parse_overrides(given) == expected
    for flag in (["--use_cpu"], ["--use_cpu", "--seed", "3"]):
        with pytest.raises(UserError, match=r"--use_cpu: expected --key=value, such as"):
            parse_overrides(flag)
    for stray in (["--report_to", "wandb", "mlflow"], ["--seed=3", "mlflow"]):
        with pytest.raises(
            UserError, match=r"mlflow: expected .* a list in brackets, --key=\[a,b\]"
        ):
            parse_overrides(stray)


def test_other_settings_on_the_command_line_are_yaml():
    given = ["--seed=1", "--report_to=[]", "--resume_from_checkpoint=true", "--eval_strategy=no"]
    assert [*parse_overrides([*given, "--fsdp=true"]).values()] == [1, [], True, False, True]


def test_a_commands_own_settings_say_what_is_text():
    given = ["--system_prompt=Note: be #1", "--generator=2024", "--seed=3"]
    assert answer_settings(None, "alpaca_eval", given).system_prompt == "Note: be #1"
    assert answer_settings(None, "alpaca_eval", given).generator == "2024"
    assert answer_settings(None, "alpaca_eval", given).seed == 3


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch):
    """As --help and the pages name them; one in the folder goes before."""
    monkeypatch.chdir(tmp_path)
    name = Path("configs/train/lmpo-llama3-8b-instruct.yaml")
    assert read_yaml(name)["objective"] == "lmpo"
    with pytest.raises(UserError, match=r"config configs/train/lmpo\.yaml: No such file"):
        read_yaml(Path("configs/train/lmpo.yaml"))
    name.parent.mkdir(parents=True)
    name.write_text("objective: simpo")
    assert read_yaml(name) == {"objective": "simpo"}
