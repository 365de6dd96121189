"""The kernels as a package that Hugging Face's ``kernels`` loads: `make hub-kernel OUT=FOLDER`.

    kernels.get_local_kernel(FOLDER).linear_logprob(hidden, weight, targets)

The folder has the layout of the Hub's fifth edition: sources in ``build/torch-BACKEND`` for each
backend, with their digests, and a card, an example and a test. Sources are those of `kernels/`, but
for the namespace of their operators, which has their hash in it: a process may load this copy and
another one, and neither changes the other. The same sources make the same bytes. Nothing is
uploaded.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from ..kernels import namespace
from ..trainer.errors import UserError

NAME, VERSION, LICENSE = "widemargin-head", 1, "Apache-2.0"
BACKENDS = ("cpu", "cuda")
SOURCES = Path(namespace.__file__).parent
ADDED = Path(__file__).parent / "hub_package"
"""What the package has besides: ``variant`` in each variant, the rest at its top."""


def write_package(out: Path, repo_id: str = f"widemargin/{NAME}") -> Path:
    """Write the package to ``out``, a folder that is new or empty.

    Args:
        repo_id: the repository it is meant for, which the card and the example name.

    Raises:
        UserError: there is something in ``out``.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"OUT: name a new or an empty folder; {out} has something in it")
    sources = _sources()
    digest = hashlib.sha256("\0".join([*sources, *sources.values()]).encode()).hexdigest()[:7]
    for backend in BACKENDS:
        name = f"_{NAME.replace('-', '_')}_{backend}_{digest}"
        _write_variant(out / "build" / f"torch-{backend}", sources, name, backend)
    for path, text in _added(ADDED).items():
        if not path.startswith("variant/"):
            _write(out / path, text.replace("REPO_ID", repo_id).replace("VERSION", str(VERSION)))
    return out


def _sources() -> dict[str, str]:
    """Every module of a variant, by its path."""
    found = _added(ADDED / "variant")
    for path in SOURCES.rglob("*.py"):
        found[path.relative_to(SOURCES).as_posix()] = path.read_text(encoding="utf-8")
    return dict(sorted(found.items()))


def _added(folder: Path) -> dict[str, str]:
    """The texts in a folder, whose names end in .txt so that nobody imports them from there."""
    paths = {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.rglob("*.txt")}
    return {name: path.read_text(encoding="utf-8") for name, path in sorted(paths.items())}


def _write_variant(folder: Path, sources: dict[str, str], name: str, backend: str) -> None:
    owned = re.compile(rf'^NAMESPACE = "{namespace.NAMESPACE}"$', re.MULTILINE)
    files: dict[str, str] = {}
    for path, source in sources.items():
        if path == "namespace.py":
            source, count = owned.subn(f'NAMESPACE = "{name}"', source)
            assert count == 1
        _write(folder / path, source)
        digest = hashlib.sha256(source.encode()).digest()
        files[path] = base64.b64encode(digest).decode()
    metadata: dict[str, Any] = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    _write(folder / "metadata.json", json.dumps(metadata, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m widemargin.integrations.hub",
        description="Write the kernels as a package for Hugging Face's Hub; uploads nothing.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or an empty folder")
    parser.add_argument("--repo-id", default=f"widemargin/{NAME}", help="what the card names")
    options = parser.parse_args(arguments)
    try:
        out = write_package(options.out, options.repo_id)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: version {VERSION}, for {' and '.join(BACKENDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
