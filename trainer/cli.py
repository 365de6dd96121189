"""The `widemargin` command, whose parts `widemargin --help` lists.

A command imports its modules when it runs, so `--help` and wrong arguments do not wait for torch.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .errors import UserError
from .evaluation.evaluate_command import add_evaluate, run_evaluate
from .plan.command import add_plan, run_plan
from .quickstart.command import add_quickstart, quickstart
from .sampling.command import COMMANDS as SAMPLING
from .sampling.command import add_sampling, run_sampling
from .sweep.command import add_sweep, run_sweep
from .text import printable, steady_console

TRACEBACK = "WIDEMARGIN_TRACEBACK"
"""Environment variable: set to 1, errors said in a line show their traceback before it."""

TRAIN_HELP = """\
Train on preference pairs with the settings of a YAML file: those of PreferenceConfig (model, data,
objective) and all of transformers.TrainingArguments. Any setting can be overridden, as --name=value
or as --name value:

  widemargin train configs/train/quickstart.yaml --beta=2.5 --learning_rate=1e-6

--resume_from_checkpoint=auto continues from the newest complete checkpoint in output_dir, if there
is one. configs/train has the published settings with comments. --preflight shows the settings that
differ from their defaults. --profile writes a trace of a few steps, trace.json.gz, for
chrome://tracing.
"""


def main(argv: Sequence[str] | None = None, *, script: str | None = None) -> int:
    """Run the command line; 0 without errors, 2 for bad input, 130 when interrupted.

    After SIGTERM during training it exits with 143, where `stop_on_collapse` ended it with 3; see
    `loop`. WIDEMARGIN_TRACEBACK=1 shows the tracebacks of bad input too.

    ``script`` names the published script that this one replaces, such as "run_simpo".
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with steady_console():
        return _guarded(argv, script)


def _guarded(argv: Sequence[str] | None, script: str | None) -> int:
    try:
        return _run(list(sys.argv[1:] if argv is None else argv), script)
    except UserError as error:
        return _refused(error, str(error))
    except OSError as error:
        if error.filename is None:
            raise
        name = printable(str(error.filename), 200)
        return _refused(error, f"{error.strerror}: {name} ({TRACEBACK}=1 shows where)")
    except UnicodeEncodeError as error:
        if sys.getfilesystemencoding() == "utf-8":
            raise
        return _refused(error, str(error))
    except SystemExit as stop:
        if not getattr(stop, "quiet", True):  # Stopped, by SIGTERM or for a collapse
            print(f"\n{stop}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        hint = "--resume_from_checkpoint=true goes on from the last checkpoint, if one was saved"
        given = (argv if argv is not None else sys.argv[1:])[:1]
        if {"evaluate", "sweep", *SAMPLING}.intersection(given):
            hint = "what is finished is kept; the same command goes on from there"
        print(f"\ninterrupted; {hint}", file=sys.stderr)
        return 130


def _refused(error: Exception, line: str) -> int:
    """Say in a line what went wrong, and after the traceback where the user asks for one."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        line += f" (names are {encoding} here; set PYTHONUTF8=1 if yours have other letters)"
    print(f"error: {line}", file=sys.stderr)
    return 2


def _run(argv: list[str], script: str | None) -> int:
    options, overrides = _parser().parse_known_args(argv)
    if options.command == "train":
        return _train(options.config, overrides, script, preflight=options.preflight)
    if options.command == "evaluate":
        return run_evaluate(options, overrides)
    if options.command in SAMPLING:
        return run_sampling(options, overrides)
    if options.command == "plan":
        return run_plan(options, overrides)
    if options.command == "sweep":
        return run_sweep(options, overrides)
    if options.command == "quickstart":
        return quickstart(options.folder, options.seed, overrides, _train)
    if overrides:
        raise UserError(f"unknown arguments: {' '.join(overrides)}; see widemargin --help")
    if options.command == "doctor":
        from .doctor.command import doctor

        return doctor(options.model, as_json=options.json)
    if options.command == "merge":
        from .model.merging import merge_folder

        place = options.folder, options.out
        print(f"Merged model: {merge_folder(*place, options.dtype, options.trust_remote_code)}")
        return 0
    return _report(options.run, options.out, options.format)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="widemargin", description="Preference tuning of language models without logits."
    )
    parser.add_argument("--version", action="version", version=f"widemargin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train with the settings of a YAML file",
        description=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("config", metavar="CONFIG.yaml")
    train.add_argument(
        "--preflight",
        action="store_true",
        help="show the settings, the data's counts and the first pair's tokens; train nothing",
    )
    add_sweep(commands)
    add_plan(commands)
    add_evaluate(commands)
    add_sampling(commands)
    report = commands.add_parser(
        "report",
        help="write the report of a run, or of several in comparison",
        description="Write the report of a run, or a comparison of several, as one HTML file. Runs "
        "that differ only in their seeds become one line with a band.",
    )
    report.add_argument(
        "run", type=Path, nargs="+", metavar="RUN", help="output folders of training runs"
    )
    report.add_argument("--out", type=Path, help="where to write (default: report.html in RUN, "
                        "or in the folder that holds all runs)")  # fmt: skip
    report.add_argument(
        "--format", choices=("html", "png"), default="html", help="png: the charts as one image"
    )
    merge = commands.add_parser(
        "merge",
        help="merge a trained adapter into its model",
        description="Merge a trained adapter into its base model. transformers, vLLM and others "
        "read the new folder without peft.",
    )
    merge.add_argument("folder", type=Path, metavar="FOLDER", help="a run's folder or checkpoint")
    merge.add_argument("--out", type=Path, help="where to write (default: merged in FOLDER)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    merge.add_argument("--dtype", choices=dtypes, default="auto",
                       help="of the weights (default: the model's own)")  # fmt: skip
    merge.add_argument("--trust-remote-code", action="store_true",
                       help="run Python code that comes with the model")  # fmt: skip
    doctor = commands.add_parser(
        "doctor",
        help="show what is installed, what a run would use, and whether the kernels work",
        description="Check this machine: its packages and devices, the choices of a run with their "
        "reasons, and the kernels on a small case. Exits with 1 if something fails.",
    )
    doctor.add_argument("--model", help="a model's folder or hub name; its weights are not read")
    doctor.add_argument("--json", action="store_true", help="print JSON for other programs")
    add_quickstart(commands)
    return parser


def _train(
    config: str, overrides: Sequence[str], script: str | None = None, *, preflight: bool = False
) -> int:
    from .settings.files import joined, load_config
    from .settings.launch import leave_group
    from .train import preflight as run_preflight
    from .train import train

    atexit.register(leave_group)
    overrides = ["--profile=true" if o == "--profile" else o for o in joined(overrides)]
    settings = load_config(config, overrides, script=script)
    if preflight:
        run_preflight(settings, script)
    else:
        train(settings, script)
    return 0


def _report(runs: list[Path], out: Path | None, form: str) -> int:
    from .report.write import summary_lines, write_report

    path = write_report(runs, out, form=form)
    print("\n".join([*summary_lines(runs), "", f"Report: {path}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
