"""The package for the Hub: how it loads, that it is the same head, and that it keeps to itself."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from widemargin.integrations.hub import main, write_package
from widemargin.kernels.linear_logprob import linear_logprob
from widemargin.trainer.errors import UserError

hf_kernels = pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("hub") / "package")


def loaded(package: Path) -> Any:
    return hf_kernels.get_local_kernel(package, backend="cpu")


def answers(function: Any, tail: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 64, generator=generator, requires_grad=True)
    weight = torch.randn(1000, 64, generator=generator, requires_grad=True)
    targets = torch.randint(1000, (50,), generator=generator)
    logps, entropy = function(hidden, weight, targets, tail=tail, return_entropy=True)
    return [logps, entropy, *torch.autograd.grad(logps.sum(), (hidden, weight))]


@pytest.mark.parametrize("tail", ["exact", "mean"])
def test_outputs_are_bit_for_bit_the_packages(package, tail):
    for ours, theirs in zip(
        answers(linear_logprob, tail), answers(loaded(package).linear_logprob, tail), strict=True
    ):
        assert torch.equal(ours, theirs)


def run(code: str, package: Path, **environment: str) -> str:
    command = [sys.executable, "-B", "-I", "-c", code, str(package)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, cwd=package, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.costly
def test_it_runs_without_this_package(package):
    code = (
        "import importlib.abc, runpy, sys\n"
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        assert name.partition('.')[0] != 'widemargin', name\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "runpy.run_path(sys.argv[1] + '/tests/test_head.py', run_name='__main__')\n"
        "runpy.run_path(sys.argv[1] + '/example.py', run_name='__main__')\n"
    )
    assert run(code, package).startswith("values and gradients agree\n[")


@pytest.mark.costly
def test_get_kernel_loads_it_by_its_name(package):
    code = (
        "import kernels, torch\n"
        "head = kernels.get_kernel('widemargin/widemargin-head', version=1)\n"
        "h, w = torch.randn(3, 8), torch.randn(200, 8)\n"
        "print(head.linear_logprob(h, w, torch.arange(3)).shape)\n"
    )
    local = f"widemargin/widemargin-head={package}"
    assert run(code, package, LOCAL_KERNELS=local) == "torch.Size([3])\n"


def test_kernelize_takes_the_layer(package):
    @hf_kernels.use_kernel_forward_from_hub("LinearLogProb")
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(300, 8))

        def forward(self, hidden, targets):
            logps = (hidden @ self.weight.T).log_softmax(-1)
            return logps.gather(-1, targets[:, None])[:, 0]

    net = torch.nn.ModuleDict({"head": Layer()})
    inputs = torch.randn(5, 8), torch.arange(5)
    before = net["head"](*inputs)
    layer = hf_kernels.LocalLayerRepository(repo_path=package, layer_name="LinearLogProb")
    with hf_kernels.use_kernel_mapping({"LinearLogProb": {"cpu": layer}}):
        hf_kernels.kernelize(net, mode=hf_kernels.Mode.TRAINING, device="cpu")
    after = net["head"](*inputs)
    assert "linear_logprob" in type(after.grad_fn).__name__
    torch.testing.assert_close(after, before)


def marked(package: Path, folder: Path) -> Path:
    """A copy whose log-probs are larger by one, as a Hub package of other sources would be."""
    shutil.copytree(package, folder)
    file = folder / "build" / "torch-cpu" / "linear_logprob" / "torch_forward.py"
    source = file.read_text()
    assert source.count("target_logits - lse") == 1
    file.write_text(source.replace("target_logits - lse", "target_logits - lse + 1"))
    return folder


def renamed(package: Path, name: str) -> Path:
    """With another namespace for its operators."""
    variant = package / "build" / "torch-cpu"
    metadata = json.loads((variant / "metadata.json").read_text())
    for file in (variant / "namespace.py", variant / "metadata.json"):
        file.write_text(file.read_text().replace(metadata["id"], name))
    return package


def test_two_copies_in_one_process_do_not_touch_each_other(package, tmp_path):
    before = answers(linear_logprob, "mean")
    other = loaded(renamed(marked(package, tmp_path / "other"), "_marked_head_cpu_0000000"))
    shifted = answers(other.linear_logprob, "mean")
    torch.testing.assert_close(shifted[0], before[0] + 1)
    for again, first in zip(answers(linear_logprob, "mean"), before, strict=True):
        assert torch.equal(again, first)


def test_a_second_copy_with_the_same_namespace_is_refused(package, tmp_path):
    """Else torch would run the copy's code for this package's calls."""
    before = answers(linear_logprob, "mean")
    other = marked(package, tmp_path / "other")
    variant = other / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    renamed(other, "_marked_head_cpu_1111111")
    namespace = variant / "namespace.py"
    namespace.write_text(namespace.read_text().replace("_marked_head_cpu_1111111", "widemargin"))
    assert name not in namespace.read_text()
    with pytest.raises(ImportError, match=r"import one copy of its kernels in a process"):
        loaded(other)
    for again, first in zip(answers(linear_logprob, "mean"), before, strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_metadata_has_every_files_digest(package, backend):
    variant = package / "build" / f"torch-{backend}"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"].startswith(f"_widemargin_head_{backend}_")
    assert metadata["backend"] == {"type": backend}
    assert f'NAMESPACE = "{metadata["id"]}"\n' in (variant / "namespace.py").read_text()
    digests = {
        path.relative_to(variant).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in variant.rglob("*.py")
    }
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}


def test_hugging_faces_own_check_of_the_digest(package, tmp_path):
    rust = pytest.importorskip("kernels._rust")
    copy = tmp_path / "copy"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert len(rust.Build.open(copy).general.backends) == 2
    variant = copy / "build" / "torch-cpu"
    metadata = rust.Metadata.read_from_file(variant / "metadata.json")
    found = rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant)
    metadata.digest.validate(found)


def test_nothing_but_torch_and_triton_is_imported(package):
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    for path in (package / "build").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= allowed, path


def test_two_exports_are_the_same_bytes(package, tmp_path):
    again = write_package(tmp_path / "again")
    files = {path.relative_to(again): path.read_bytes() for path in again.rglob("*.*")
             if path.is_file()}  # fmt: skip
    assert len(files) > 40
    assert all((package / path).read_bytes() == content for path, content in files.items())


def test_a_folder_with_something_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="name a new or an empty folder"):
        write_package(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "error: OUT: name a new or an empty folder" in capsys.readouterr().err
    assert main([str(tmp_path / "new"), "--repo-id", "me/head"]) == 0
    assert 'get_kernel("me/head", version=1)' in (tmp_path / "new" / "README.md").read_text()
