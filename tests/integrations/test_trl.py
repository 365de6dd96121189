"""TRL's own trainers with this head: as with theirs, on the same seeds."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from widemargin.integrations import trl as integration
from widemargin.integrations.trl import disable, enable, use_widemargin_head
from widemargin.trainer.cli import main
from widemargin.trainer.doctor.trl import seam
from widemargin.trainer.errors import UserError

from bench.lib.peaked import peaked_case
from tests.support.head_cases import relative
from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs

trl = pytest.importorskip("trl")
if Version(trl.__version__) < Version("1.16"):
    pytest.skip("the newest TRL for this Python has no seam", allow_module_level=True)
utils = seam()

PAIRS = tiny_pairs(16)
PROMPTS = PAIRS.select_columns(["prompt"])
UNPAIRED = Dataset.from_list(
    [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"]}
        | {"label": bool(i % 2)}
        for i, row in enumerate(PAIRS.to_list())
    ]
)
DIRECT = PAIRS.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
GEMMA = {"family": "gemma2", "final_logit_softcapping": 5.0}
VOCABULARY = 700
"""Six blocks; the tokenizer knows fewer tokens."""


def letters(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"data": PAIRS, "reference": True},
    "dpo softcap": {"trainer": "dpo", "data": PAIRS, "reference": True, "model": GEMMA},
    "dpo lora": {"trainer": "dpo", "data": PAIRS, "lora": True},
    "dpo weighting": {"trainer": "dpo", "data": PAIRS, "reference": True}
    | {"settings": {"use_weighting": True}},
    "kto": {"data": UNPAIRED, "reference": True},
    "sft": {"data": DIRECT},
    "grpo": {"data": PROMPTS, "extra": {"reward_funcs": letters}}
    | {"settings": {"num_generations": 2, "max_completion_length": 8}}
    | {"sampling": {"temperature": 0.7, "beta": 0.0}},
}


def run(name: str, folder: Any) -> list[dict[str, float]]:
    """Logs of four steps."""
    spec = RUNS[name]
    kind = spec.get("trainer", name).upper()
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 4, "seed": 3,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
        "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False,
    } | spec.get("settings", {}) | spec.get("sampling", {})  # fmt: skip
    model = {"vocab_size": VOCABULARY} | spec.get("model", {})
    arguments = dict(spec.get("extra", {}))
    if spec.get("reference"):
        arguments["ref_model"] = tiny_model(**model, seed=1)
    if spec.get("lora"):
        arguments["peft_config"] = lora()
    trainer = getattr(trl, f"{kind}Trainer")(
        tiny_model(**model),
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=spec["data"],
        processing_class=TOKENIZER,
        **arguments,
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.costly
@pytest.mark.parametrize("name", RUNS)
def test_a_trainer_makes_the_same_steps(name, tmp_path, monkeypatch):
    theirs = run(name, tmp_path)
    tokens: list[int] = []
    forward_op = integration.forward_op
    monkeypatch.setattr(
        integration, "forward_op", lambda *args: tokens.append(len(args[0])) or forward_op(*args)
    )
    with use_widemargin_head():
        ours = run(name, tmp_path)
    assert len(tokens) >= 4
    assert len(ours) == len(theirs) == 4
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            if not isinstance(value, float) or "time" in key or "runtime" in key:
                continue
            loose = 1e-5 if key in ("loss", "grad_norm") else 1e-4
            assert mine[key] == pytest.approx(value, rel=loose, abs=loose), key


def both_heads(*arguments: Any, **settings: Any) -> tuple[Any, Any]:
    theirs = utils._ChunkedLogProbFunction.apply(*arguments)
    with use_widemargin_head(**settings):
        return utils._ChunkedLogProbFunction.apply(*arguments), theirs


EVERY = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("tail", ["mean", "exact"])
def test_the_standard_peaked_case(tail):
    case = peaked_case(300, 64, 8192, entropy=1.5)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    arguments = (hidden, weight, None, case.targets, 0.7, 4096, None, 1.3, EVERY)
    ours, theirs = both_heads(*arguments, tail=tail)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-5)
    gradients = [
        torch.autograd.grad(found[0], (hidden, weight), case.coefficients)
        for found in (ours, theirs)
    ]
    for mine, expected in zip(*gradients, strict=True):
        assert relative(mine, expected) < {"mean": 2e-3, "exact": 1e-5}[tail]
        assert mine.norm().item() == pytest.approx(expected.norm().item(), rel=1e-5)


def test_an_entropy_bonus_with_the_exact_tail():
    case = peaked_case(60, 32, 1000, entropy=1.5)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    bias = torch.linspace(-1, 1, 1000, requires_grad=True)
    leaves = (hidden, weight, bias)
    arguments = (*leaves, case.targets, 1.3, 4096, 4.0, 1.0, EVERY)
    ours, theirs = both_heads(*arguments, tail="exact")
    gradients = [torch.autograd.grad((x[0] + 0.3 * x[1]).sum(), leaves) for x in (ours, theirs)]
    for mine, expected in zip(*gradients, strict=True):
        assert relative(mine, expected) < 1e-5


def test_an_entropy_bonus_is_refused_with_another_tail():
    case = peaked_case(60, 32, 1000, entropy=1.5)
    with use_widemargin_head():
        ours = utils._ChunkedLogProbFunction.apply(
            case.hidden.requires_grad_(), case.weight, None, case.targets, 1.0, 4096, None, 1.0
        )
        with pytest.raises(NotImplementedError, match="pass tail='exact'"):
            (ours[0] + 0.1 * ours[1]).sum().backward()


def test_backward_gathers_the_weight_again(monkeypatch):
    """As ZeRO-3 asks: between forward and backward a parameter is in pieces."""
    weight = torch.nn.Parameter(torch.randn(300, 8))
    whole = weight.data.clone()

    @contextlib.contextmanager
    def gathered(*parameters):
        assert parameters[0] is weight
        weight.data = whole
        yield
        weight.data = whole[:0]

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gathered)
    hidden = torch.randn(5, 8, requires_grad=True)
    with use_widemargin_head():
        with utils.maybe_gather_lm_head_ctx(weight, None):
            found = utils._ChunkedLogProbFunction.apply(
                hidden, weight, None, torch.arange(5), 1.0, 4096, None, 1.0
            )
        (gradient,) = torch.autograd.grad(found[0].sum(), hidden)
    assert (gradient != 0).all()


def test_switching_it_off_gives_everything_back():
    before = dict(vars(utils))
    with use_widemargin_head():
        assert utils._ChunkedLogProbFunction is not before["_ChunkedLogProbFunction"]
        with use_widemargin_head(tail="exact"):
            pass
        assert utils._ChunkedLogProbFunction is not before["_ChunkedLogProbFunction"]
        enable(tail="drop")
    assert dict(vars(utils)) == before
    enable()
    enable(tail="exact")
    disable()
    assert dict(vars(utils)) == before
    disable()
    with pytest.raises(RuntimeError), use_widemargin_head():
        raise RuntimeError
    assert dict(vars(utils)) == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"tail": "average"}, "tail"), ({"tail_eps": 2.0}, "tail_eps"), ({"backend": "x"}, "backend")],
)
def test_a_wrong_setting_changes_nothing(setting, said):
    before = dict(vars(utils))
    with pytest.raises(UserError, match=said):
        enable(**setting)
    assert dict(vars(utils)) == before


def test_an_unknown_trl_is_refused(monkeypatch, capsys):
    class Other:
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            pass

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.raises(
        UserError, match=r"trl: install TRL 1.16.*calls its own head in another way"
    ):
        enable()
    assert main(["doctor"]) == 0
    assert "warn  trl: use_widemargin_head does not fit" in capsys.readouterr().out
    monkeypatch.undo()
    for name in ("_ChunkedLogProbFunction", "add_fused_lm_head", "_use_triton"):
        with monkeypatch.context() as patch:
            patch.delattr(utils, name)
            with pytest.raises(UserError, match=r"in another way"):
                enable()


def test_doctor_says_that_it_fits(capsys):
    assert main(["doctor"]) == 0
    assert ", which use_widemargin_head fits" in capsys.readouterr().out
