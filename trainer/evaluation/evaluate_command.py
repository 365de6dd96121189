"""The command line of `widemargin evaluate`; quick to import."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError

PAIRS = """\
Rewards of a model on preference pairs: accuracy, margins, accuracy by which side is longer, and
calibration, through the head without logits. The data are those of a training config, or --dataset
(the evaluation split where there is one). With --reference also DPO's reward.

  widemargin evaluate pairs --model outputs/run --config configs/train/quickstart.yaml
"""
PAIRS_SETTINGS = """\
settings, as --KEY=VALUE: those of the data as in training (max_length, max_prompt_length,
  chat_template, chat_rendering, eval_dataset, ...); tokenizer_as_saved, beta, packing,
  max_tokens_per_batch; dtype, device, attn_implementation, model_revision, trust_remote_code"""
ANSWERS = """\
Answer {benchmark}'s questions with a model, and write what its tool reads ({files}).
A run that is stopped goes on where it was. If the tool is here and OPENAI_API_KEY is set, it is
called (a judge costs money; --no-judge leaves it out); else the command to run is shown.

  widemargin evaluate {command} --model outputs/run --config configs/eval/NAME.yaml
"""
ANSWERS_SETTINGS = """\
settings, as --KEY=VALUE or in the config: temperature, top_p, top_k, max_new_tokens, seed,
  stop_token_ids, batch_size, engine (auto, transformers, vllm); chat_template, system_prompt,
  tokenizer_as_saved, questions, generator; dtype, device, attn_implementation,
  model_name_or_path, model_revision, trust_remote_code"""
HARNESS = """\
Run the Language Model Evaluation Harness (pip install 'widemargin[eval]') with the tasks and
numbers of examples of the Open LLM Leaderboards, or tasks by name.

  widemargin evaluate lm-eval --model outputs/run --tasks leaderboard-v1
"""
HARNESS_SETTINGS = """\
settings, as --KEY=VALUE: batch_size, num_fewshot, apply_chat_template, tokenizer_as_saved;
  dtype, device, attn_implementation, model_revision, trust_remote_code"""


def add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate` and its own commands."""
    evaluate = commands.add_parser(
        "evaluate",
        help="score preference pairs, or answer AlpacaEval, Arena-Hard and the leaderboards",
        description="Evaluate a trained model.",
        allow_abbrev=False,
    )
    kinds = evaluate.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    pairs = _add(kinds, "pairs", "rewards on a preference set", PAIRS, PAIRS_SETTINGS)
    pairs.add_argument("--reference", metavar="DIR", help="a frozen model, for DPO's reward")
    pairs.add_argument("--dataset", metavar="DATA", help="a file, a folder or a hub name")
    pairs.add_argument("--split", help="a split of it, such as test")
    pairs.add_argument("--config", metavar="TRAIN.yaml", help="take its data settings and beta")
    pairs.add_argument("--max-pairs", type=int, metavar="N", help="only the first N rows")
    about = {"benchmark": "AlpacaEval 2", "files": "model_outputs.json", "command": "alpaca-eval"}
    alpaca = _add(kinds, "alpaca-eval", "answer AlpacaEval 2", ANSWERS.format(**about))
    about = {"benchmark": "Arena-Hard", "files": "an answer file", "command": "arena-hard"}
    arena = _add(kinds, "arena-hard", "answer Arena-Hard (v0.1, v2.0)", ANSWERS.format(**about))
    arena.add_argument(
        "--arena-hard-dir", type=Path, metavar="CLONE", help="a clone of arena-hard-auto to judge"
    )
    for command in (alpaca, arena):
        _add_answering(command)
    harness = _add(kinds, "lm-eval", "Open LLM Leaderboards v1, v2", HARNESS, HARNESS_SETTINGS)
    harness.add_argument(
        "--tasks",
        default="leaderboard-v1",
        help="leaderboard-v1 (default), leaderboard-v2, or tasks of the harness between commas",
    )
    harness.add_argument("--limit", type=int, metavar="N", help="N questions a task, for a trial")
    harness.add_argument("--include-path", type=Path, metavar="DIR", help="your own tasks")


def _add(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    settings: str = ANSWERS_SETTINGS,
) -> argparse.ArgumentParser:
    command = kinds.add_parser(
        name,
        help=summary,
        description=description,
        epilog=settings,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--model", metavar="DIR", help="a saved model's folder or hub name")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write (default: MODEL/evaluation/...)"
    )
    return command


def _add_answering(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--config", metavar="EVAL.yaml", help="how to answer; those published are in configs/eval")
    add("--questions", metavar="FILE", help="the question file (default: from the hub)")
    add("--limit", type=int, metavar="N", help="only the first N questions")
    add("--no-judge", action="store_true", help="never call the benchmark's tool")
    add("--judge-model", metavar="NAME", help="judge here, with our prompt: no official number")
    add("--judge-url", metavar="URL", help="of an OpenAI-compatible endpoint, up to /v1")
    add("--judge-parallel", type=int, default=4, metavar="N", help="questions asked at once")
    add(
        "--baseline",
        metavar="FILE",
        help="answers that a judge compares with (default for AlpacaEval's tool: its own baseline)",
    )


def run_evaluate(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run the benchmark that the command line names; 0, or a ``UserError``."""
    if options.benchmark in ("pairs", "lm-eval") and not options.model:
        raise UserError("--model: none is given; set it to a saved model's folder or a hub name")
    if options.benchmark == "pairs":
        from .pairs import evaluate_pairs
        from .settings import pair_settings

        settings, betas = pair_settings(options.config, options.dataset, options.split, overrides)
        evaluate_pairs(
            options.model,
            settings,
            betas,
            reference=options.reference,
            max_pairs=options.max_pairs,
            out=options.out,
        )
    elif options.benchmark == "lm-eval":
        from ..settings.files import parse_overrides
        from .harness import lm_eval
        from .settings import HarnessSettings, build

        lm_eval(
            options.model,
            options.tasks,
            build(HarnessSettings, parse_overrides(overrides, HarnessSettings)),
            limit=options.limit,
            include_path=options.include_path,
            out=options.out,
        )
    else:
        from .benchmarks import alpaca_eval, arena_hard

        run = alpaca_eval if options.benchmark == "alpaca-eval" else arena_hard
        run(options, overrides)
    return 0
