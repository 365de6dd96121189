"""The command line of `widemargin generate`, `score` and `pair`; quick to import."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError, expect_whole

COMMANDS = ("generate", "score", "pair")
GENERATE = """\
Answer prompts with a model, several times each, and keep every answer with its token ids. The same
command goes on where it was stopped; a larger --n adds answers.

  widemargin generate prompts.jsonl --model outputs/run --out answers --n 5 --temperature=0.8
"""
GENERATE_SETTINGS = """\
settings, as --KEY=VALUE: temperature (0.8), top_p (0.95), top_k, max_new_tokens, seed,
  stop_token_ids, batch_size, engine (auto, transformers, vllm), server_url (an OpenAI-compatible
  server up to /v1, in place of an engine; --model is then its name for the model); chat_template,
  system_prompt, tokenizer_as_saved; dtype, device, attn_implementation, model_revision,
  trust_remote_code"""
SCORE = """\
Score the answers of a folder by a reward model, a judge, or a function of yours that gets the
prompt, the answer's text and the data's row. The same command goes on where it was stopped.

  widemargin score answers --by python:rules:brevity
"""
SCORE_SETTINGS = """\
settings, as --KEY=VALUE: batch_size; judge_url (up to /v1; the key is OPENAI_API_KEY's);
  chat_template, tokenizer_as_saved, dtype, device, attn_implementation, model_revision,
  trust_remote_code (of a reward model)"""
PAIR = """\
Make training data of scored answers, and a report of the prompts that are left out.

  widemargin pair answers --out pairs.jsonl
"""


def add_sampling(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the three commands."""
    make = _add(commands, "generate", "answer prompts with a model", GENERATE, GENERATE_SETTINGS)
    make.add_argument("prompts", metavar="PROMPTS", help="a data file, a folder or a hub name")
    make.add_argument("--model", required=True, metavar="DIR", help="a folder or a hub name")
    make.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where to write")
    make.add_argument("--n", type=int, default=5, help="answers a prompt (default: %(default)s)")
    make.add_argument("--split", help="of PROMPTS (default: train)")
    make.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    rate = _add(commands, "score", "score the answers of generate", SCORE, SCORE_SETTINGS)
    rate.add_argument("folder", type=Path, metavar="FOLDER", help="what generate wrote")
    rate.add_argument("--by", required=True, metavar="WHAT",
                      help="model:DIR, judge:NAME or python:MODULE:FUNCTION")  # fmt: skip
    rate.add_argument("--name", help="of these scores (default: from --by)")
    rate.add_argument("--max-failures", type=float, default=0.01, metavar="SHARE",
                      help="stop if more answers get no score (default: %(default)s)")  # fmt: skip
    _add_pair(commands)


def _add_pair(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = _add(commands, "pair", "make pairs of scored answers", PAIR, "").add_argument
    add("folder", type=Path, metavar="FOLDER", help="what generate and score wrote")
    add("--out", required=True, type=Path, metavar="FILE.jsonl", help="where to write")
    add("--scores", metavar="NAME", help="which scores (default: the only ones)")
    add("--rule", default="best-worst", help="best-worst (default), best-vs-rest or all")
    add("--as", dest="form", default="pairs", metavar="FORM",
        help="pairs (default), trees (prompt, completions, scores) or kto (prompt, completion, "
        "label)")  # fmt: skip
    add("--min-gap", type=float, default=0.0, help="least difference of scores in a pair")
    add("--max-length-ratio", type=float, help="most that one answer may be longer, as a factor")
    add("--balance-length", action="store_true",
        help="as many pairs with the longer answer chosen as rejected")  # fmt: skip
    add("--keep-unfinished", action="store_true", help="keep answers cut at max_new_tokens")
    add("--tokens-for", metavar="DIR",
        help="write token ids to train this model, whose tokenizer is generate's")  # fmt: skip


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    settings: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=settings,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run_sampling(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run the command that the command line names; 0, or a ``UserError``."""
    from ..evaluation.settings import build
    from ..settings.files import parse_overrides

    if options.command == "generate":
        from .generate import SampleSettings, generate

        expect_whole("--n", options.n, 1)
        if options.limit is not None:
            expect_whole("--limit", options.limit, 1)
        settings = build(SampleSettings, parse_overrides(overrides, SampleSettings))
        where = options.prompts, options.model, options.out
        generate(*where, settings, n=options.n, split=options.split, limit=options.limit)
    elif options.command == "score":
        from .score import score
        from .scorers import ScoreSettings

        settings = build(ScoreSettings, parse_overrides(overrides, ScoreSettings))
        limits = {"name": options.name, "max_failures": options.max_failures}
        score(options.folder, options.by, settings, **limits)
    else:
        from .pair import PairRequest, pair

        if overrides:
            raise UserError(f"unknown arguments: {' '.join(overrides)}; see widemargin pair --help")
        names = PairRequest.__dataclass_fields__
        request = PairRequest(**{name: getattr(options, name) for name in names})
        pair(options.folder, options.out, request, options.scores)
    return 0
