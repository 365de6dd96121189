"""Files that others read: workflows, forms, the citation, the changelog, launch files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from widemargin.trainer import __version__

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
FORMS = [p for p in sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")) if p.stem != "config"]
SCHEMAS = {
    "github-workflows": WORKFLOWS,
    "github-issue-forms": FORMS,
    "github-issue-config": [ROOT / ".github/ISSUE_TEMPLATE/config.yml"],
    "citation-file-format": [ROOT / "CITATION.cff"],
}
ALONE = """
import sys
from widemargin.trainer.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
names = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print("imported", *sorted(n for n in names if not n.startswith(("_", "widemargin"))))
"""


def test_the_files_are_there():
    assert {path.stem for path in WORKFLOWS} == {"tests", "docs", "release"}
    assert len(FORMS) == 2


@pytest.mark.costly
@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_follow_their_schema(schema):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*command, *SCHEMAS[schema]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_is_there(path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    for name in re.findall(r"(?:^|\s)((?:\.ci|tests|bench)/[\w./-]+)", commands):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"\bmake ([a-z-]+)", commands):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert all("timeout-minutes" in job for job in jobs.values())


def test_tests_on_a_push_are_those_of_ci():
    assert ".ci/run" in (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")


def test_one_version_everywhere():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.+)"$', pyproject, re.MULTILINE) == [__version__]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", changes, re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert versions[1] == (__version__, citation["date-released"])


@pytest.mark.costly
def test_help_imports_the_standard_library_alone():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd="/")
    assert done.stdout.splitlines()[-1] == "imported"


def test_version_is_printed():
    command = [sys.executable, "-m", "widemargin.trainer.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"widemargin {__version__}\n"


@pytest.mark.parametrize("path", sorted(ROOT.glob("containers/*.Dockerfile")), ids=lambda p: p.stem)
def test_dockerfiles_copy_what_the_build_sees(path):
    """Only what .dockerignore lets through can be copied."""
    let_in = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    text = path.read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    assert (
        {"pyproject.toml", "kernels", "trainer", "integrations", "configs"} <= set(copied) <= let_in
    )
    assert all((ROOT / name).exists() for name in copied)
    assert re.search(r"^USER user$", text, re.MULTILINE)


def test_launch_files_start_published_settings():
    slurm = (ROOT / "launch/slurm.sbatch").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n"], input=slurm, text=True, check=True)
    sky = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text(encoding="utf-8"))
    subprocess.run(["bash", "-n"], input=sky["run"] + sky["setup"], text=True, check=True)
    engine = sky["envs"]["ENGINE"]
    assert (ROOT / sky["envs"]["CONFIG"]).is_file()
    assert (ROOT / f"configs/accelerate/{engine}.yaml").is_file()
    assert f"ENGINE:-{engine}" in slurm
    for text in (slurm, sky["run"]):
        assert "-m widemargin.trainer" in text
        assert "--resume_from_checkpoint=auto" in text
