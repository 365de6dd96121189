"""The patched head: every family's log-probs and gradients equal those of its own logits."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, GPT2Config, GPT2LMHeadModel, T5Config
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.model.trial import check_head

from tests.support.tiny_models import VOCABULARY, tiny_model

FAMILIES = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama tied"),
    pytest.param("mistral", {"sliding_window": 8}, id="mistral"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param("qwen3", {}, id="qwen3"),
    pytest.param("gemma2", {"final_logit_softcapping": 3.0}, id="gemma2 softcap"),
    pytest.param("gemma3_text", {}, id="gemma3"),
    pytest.param("cohere", {"logit_scale": 0.25}, id="cohere scale"),
    pytest.param("granite", {"logits_scaling": 4.0}, id="granite scaling"),
    pytest.param("phi", {}, id="phi bias"),
]


def batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (3, 14), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 10:] = 0
    select = torch.tensor([2, 3, 4, 14 + 5, 14 + 6, 28, 40])
    targets = tokens.flatten()[select + 1]
    return tokens, mask, select, targets


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_equals_the_models_own_logits(family, changes):
    model = tiny_model(family, **changes)
    plain = copy.deepcopy(model)
    tokens, mask, select, targets = batch()
    patch_head(model, tail="exact")
    scored = model(input_ids=tokens, attention_mask=mask, select=select, targets=targets)
    logits = plain(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    logits = logits.flatten(0, 1)[select]
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(scored.token_logps, expected, rtol=1e-4, atol=1e-5)
    if family != "gemma2":
        torch.testing.assert_close(scored.mean_logits, logits.mean(-1), rtol=1e-4, atol=1e-5)
    grad = torch.linspace(-1, 1, len(targets))
    scored.token_logps.backward(grad)
    expected.backward(grad)
    for (name, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            assert got.grad is not None, name
            error = (got.grad - wanted.grad).norm() / wanted.grad.norm().clamp_min(1e-6)
            assert error < 1e-4, name
    check_head(model)


def test_generation_and_plain_calls_are_untouched():
    model = tiny_model()
    tokens, mask, _, _ = batch()
    before = model(input_ids=tokens, attention_mask=mask).logits
    written = model.generate(tokens[:1], max_new_tokens=5, do_sample=False)
    patch_head(model)
    assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits, before)
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=5, do_sample=False), written)


def test_generation_passes_what_it_passed_before():
    """`generate` asks the signature for positions, a mask and ``logits_to_keep``."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)
    config.initializer_range = 0.5
    model: Any = GPT2LMHeadModel(config).eval()
    tokens, mask, _, _ = batch()
    mask[:] = 1
    mask[0, :6] = 0
    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None}
    masked = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask, **ends}
    before = model.generate(tokens, **masked)
    accepted = inspect.signature(model.forward).parameters
    patch_head(model)
    assert [*inspect.signature(model.lm_head.forward).parameters] == ["input", "targets"]
    _check_generates(model, tokens, masked, before, accepted)
    for keep in (True, False):
        _check_generates(_as_accelerate_has_it(model, keep), tokens, masked, before, accepted)
    with pytest.raises(ValueError, match="a_typo"):
        model.generate(tokens, a_typo=1, **masked)


def _check_generates(model, tokens, given, expected, accepted):
    assert torch.equal(model.generate(tokens, **given), expected)
    assert accepted.keys() < inspect.signature(model.forward).parameters.keys()
    assert model._supports_logits_to_keep()


def _as_accelerate_has_it(model: Any, keep: bool) -> Any:
    """Prepared for bf16; with its autocast, or bare again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    bare = accelerator.unwrap_model(accelerator.prepare_model(model), keep_fp32_wrapper=keep)
    AcceleratorState._reset_state(reset_partial_state=True)
    return bare


def test_devices_hooks_stay_around_the_patched_calls():
    """``device_map``: accelerate brings weights and inputs together in such a hook."""
    tokens, mask, select, targets = batch()
    inputs = {"attention_mask": mask, "select": select, "targets": targets}
    for first, second in ((patch_head, _offload_head), (_offload_head, patch_head)):
        model = tiny_model()
        patch_head(model)
        expected = model(tokens, **inputs).token_logps
        model = tiny_model()
        for step in (first, second, patch_head):
            step(model)
        assert model.lm_head.weight.device.type == "meta"
        torch.testing.assert_close(model(tokens, **inputs).token_logps, expected)


def _offload_head(model):
    hook = AlignDevicesHook("cpu", offload=True, weights_map=dict(model.lm_head.state_dict()))
    add_hook_to_module(model.lm_head, hook)


def test_patching_twice_replaces_the_settings():
    model = tiny_model()
    patch_head(model, tail="mean")
    scoring = patch_head(model, tail="exact")
    tokens, _, select, targets = batch()
    model(input_ids=tokens, select=select, targets=targets).token_logps.sum().backward()
    assert scoring.stats is not None
    assert scoring.stats.dense == 1


def test_a_copy_is_its_own_model():
    model = tiny_model()
    patch_head(model, tail="exact")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    tokens, _, select, targets = batch()
    scored = [
        m(input_ids=tokens, select=select, targets=targets).token_logps for m in (model, twin)
    ]
    torch.testing.assert_close(
        scored[1], torch.full_like(scored[1], -torch.tensor(VOCABULARY).log().item())
    )
    assert not torch.allclose(scored[0], scored[1])


def test_a_saved_module_loads_and_scores(tmp_path):
    model = tiny_model()
    try:
        torch.save(model, tmp_path / "plain.pt")
    except AttributeError as error:
        pytest.skip(f"this transformers has modules that are not saved as they are: {error}")
    patch_head(model, tail="exact")
    tokens, _, select, targets = batch()
    expected = model(input_ids=tokens, select=select, targets=targets).token_logps
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    found = loaded(input_ids=tokens, select=select, targets=targets).token_logps
    assert torch.equal(found, expected)
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize("keep", [True, False])
def test_accelerate_wraps_it_and_takes_the_wrapper_off(keep):
    model = tiny_model()
    patch_head(model, tail="exact")
    tokens, _, select, targets = batch()
    expected = model(input_ids=tokens, select=select, targets=targets).token_logps
    bare = _as_accelerate_has_it(model, keep)
    found = bare(input_ids=tokens, select=select, targets=targets).token_logps
    bound = 0.1 if keep else 1e-6  # kept, it computes in bf16
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def test_lora_in_attention_trains_and_on_the_head_is_refused():
    from widemargin.trainer.model.adapters import with_adapter

    model = tiny_model()
    patch_head(model, tail="exact")
    adapted = with_adapter(model, LoraConfig(target_modules=["q_proj"], r=2))
    tokens, mask, select, targets = batch()
    adapted(
        input_ids=tokens, attention_mask=mask, select=select, targets=targets
    ).token_logps.sum().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert grads
    assert all("lora" in name and grad is not None for name, grad in grads.items())
    for refused in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        fresh = tiny_model()
        patch_head(fresh)
        with pytest.raises(UserError, match="lm_head"):
            with_adapter(fresh, LoraConfig(**{"target_modules": ["q_proj"], "r": 2} | refused))


def test_a_head_that_was_replaced_afterwards():
    tokens, _, select, targets = batch()
    inputs = {"input_ids": tokens, "select": select, "targets": targets}
    model = tiny_model()
    patch_head(model)
    model.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(UserError, match=r"call patch_head once more .* a new Linear"):
        model(**inputs)
    patch_head(model)
    check_head(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UserError, match="out of the adapter's target_modules"):
        adapted(**inputs)
    # peft wraps a tied lm_head, which the owner of this config does not name.
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3])
    adapted = get_peft_model(tiny_model(tie_word_embeddings=True), config)
    with pytest.raises(UserError, match=r"tied to it, .* and trainable_token_indices$"):
        patch_head(adapted)


def test_tokens_put_before_the_prompt_are_refused():
    """They would move every position that select counts."""
    tokens, _, select, targets = batch()
    model = tiny_model()
    patch_head(model)
    soft = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match="inputs_embeds: give input_ids"):
        soft(input_ids=tokens, select=select, targets=targets)
    assert soft(input_ids=tokens).logits.shape[:2] == (3, 17)


def test_an_adapters_model_is_patched_inside():
    tokens, _, select, targets = batch()
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    scoring = patch_head(model)
    assert model.get_base_model().scoring is scoring
    check_head(model)
    assert model(input_ids=tokens, select=select, targets=targets).token_logps.requires_grad


def test_replicas_of_threads_are_refused():
    """What DataParallel makes of a model for each GPU."""
    model = tiny_model()
    patch_head(model)
    with pytest.raises(UserError, match="one process for each GPU"):
        torch.nn.DataParallel(model).module._replicate_for_data_parallel()


def test_models_it_cannot_take():
    seq2seq = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    with pytest.raises(UserError, match="encoder-decoder"):
        patch_head(seq2seq)
    with pytest.raises(UserError, match="AutoModelForCausalLM"):
        patch_head(tiny_model().model)
    for other in ("a-name", None, torch.nn.Linear(2, 2), torch.nn.DataParallel(tiny_model())):
        with pytest.raises(UserError, match=f"got {type(other).__name__}; patch the bare model"):
            patch_head(other)


def test_a_mask_in_place_of_positions():
    model = tiny_model()
    patch_head(model)
    tokens, mask, _, targets = batch()
    with pytest.raises(ValueError, match=r"select: expected int64 .* got torch.bool .* \[3, 14\]"):
        model(input_ids=tokens, select=mask.bool(), targets=targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_allows_for_autocast(dtype):
    """Also where a model makes fp32 of its logits, or weights are bf16 themselves."""
    model = tiny_model().to(dtype)
    head = model.get_output_embeddings()
    patch_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        check_head(model)
        head.register_forward_hook(
            lambda module, args, out: out.float() if isinstance(out, torch.Tensor) else out
        )
        check_head(model)


def test_logits_treated_in_an_unknown_way_are_noticed():
    model = tiny_model()
    head = model.get_output_embeddings()
    head.register_forward_hook(
        lambda module, args, out: out * 2 if isinstance(out, torch.Tensor) else out
    )
    patch_head(model)
    with pytest.raises(UserError, match="own logits"):
        check_head(model)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_figures_of_tokens_are_those_of_the_models_logits(softcap):
    model = tiny_model()
    tokens, _, select, targets = batch()
    scoring = patch_head(model, figures=True)
    scoring.softcap = softcap
    figures = model(input_ids=tokens, select=select, targets=targets).figures
    logits = model(input_ids=tokens).logits.flatten(0, 1)[select].double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    p = logits.softmax(-1)
    expected = torch.stack(
        [(p**2).sum(-1).log(), -(p * p.log()).sum(-1), (p.argmax(-1) == targets).double()]
    )
    torch.testing.assert_close(figures.double(), expected, rtol=1e-4, atol=1e-5)
    assert not figures.requires_grad
    assert patch_head(model).figures is False
    assert model(input_ids=tokens, select=select, targets=targets).figures is None
