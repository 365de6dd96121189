"""The model card, and pushing it: what it says, what it escapes, and a hub that is away."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers.trainer
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model
from widemargin.trainer.checkpoint.card import PAPERS, _citation
from widemargin.trainer.cli import main
from widemargin.trainer.objectives import OBJECTIVES

from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs, tiny_trainer


class Refused(HfHubHTTPError.__bases__[0]):
    """As the hub's client raises it where nothing answers."""


class Hub:
    """Stands in for the hub's client: keeps what is uploaded, or is away."""

    def __init__(self, away_from: str | None = None) -> None:
        self.away_from, self.uploads = away_from, []

    def create_repo(self, name, **kwargs):
        if self.away_from == "create_repo":
            raise Refused("[Errno 111] Connection refused")
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, *, folder_path, **kwargs):
        if self.away_from == "upload_folder":
            raise Refused("[Errno 111] Connection refused")
        self.uploads.append(sorted(p.name for p in Path(folder_path).iterdir()))


@pytest.fixture
def run_config(tmp_path):
    """A config file of a short run with held-out pairs."""
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name, seed in (("train", 0), ("test", 1)):
        tiny_pairs(8, seed).to_json(tmp_path / "data" / f"{name}.jsonl")
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": str(tmp_path / "data"),
        "objective": "lmpo",
        "beta": 3.0,
        "max_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
        "disable_tqdm": True,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "max_prompt_length": 32,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "c.yaml"


def test_every_objective_has_its_paper():
    assert PAPERS.keys() == OBJECTIVES.keys() - {"sft"}


def test_a_mixture_has_the_papers_of_its_parts():
    cited = _citation("0.8*dpo + 0.2*bco + sft")
    assert cited.count("arxiv.org") == 2
    assert all(PAPERS[part][1] in cited for part in ("dpo", "bco"))


@pytest.mark.costly
def test_a_run_ends_with_its_card(run_config, tmp_path, monkeypatch):
    assert main(["train", str(run_config)]) == 0
    card: Any = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "transformers"
    assert {"widemargin", "lmpo"} <= set(card.data.tags or [])
    assert card.data.base_model is None  # a folder of this machine says nothing on the hub
    assert OBJECTIVES["lmpo"].formula in card.text
    assert "https://arxiv.org/abs/2502.14643" in card.text
    assert "| `beta` | `3.0` |" in card.text
    assert "| held-out pairs | first | last |" in card.text
    assert "| pairs | 8 | 8 |" in card.text
    assert "| from | `data` train | `data` test |" in card.text
    assert "torch 2" in card.text
    assert "Trained from `model` (a local folder)" in card.text
    assert "to be replaced by paths of yours: `model`, `data`" in card.text
    assert str(tmp_path) not in card.text
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert settings["objective"] == "lmpo"
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)  # where the names in the card are folders
    assert main(["train", "again.yaml", "--output_dir=b"]) == 0
    ends = [json.loads((tmp_path / d / "trainer_state.json").read_text()) for d in ("run", "b")]
    losses = [[e["loss"] for e in end["log_history"] if "loss" in e] for end in ends]
    assert losses[0] == losses[1]


def test_the_trainer_alone_writes_one_and_nothing_in_it_is_live(tmp_path):
    trainer = tiny_trainer(tmp_path / "<b>|`x", objective="simpo", max_steps=1)
    trainer.train()
    trainer.create_model_card(license="mit", model_name="<script>a|b", dataset="owner/pairs")
    card: Any = ModelCard.load(tmp_path / "<b>|`x" / "README.md")
    assert (card.data.license, card.data.datasets) == ("mit", ["owner/pairs"])
    assert "\\<script\\>" in card.text
    assert "<script" not in card.text.replace("\\<script", "")
    assert "training pairs" in card.text


def test_the_card_of_an_adapter_that_went_on_names_its_base(tmp_path):
    """It is trained from a local folder; the hub shows an adapter under its base alone."""
    model = tiny_model()
    model.name_or_path = "owner/base"
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    trainer = tiny_trainer(
        tmp_path / "run", adapted, max_steps=1, model_name_or_path=str(tmp_path / "adapter")
    )
    trainer.create_model_card()
    card: Any = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model == "owner/base"
    assert "Trained from `adapter` (a local folder)" in card.text


def test_the_card_has_the_results_of_the_model_that_was_kept(run_config, tmp_path):
    best = ["--load_best_model_at_end=true", "--greater_is_better=true", "--save_steps=1"]
    more = ["--save_strategy=steps", "--metric_for_best_model=loss", "--learning_rate=0.01"]
    assert main(["train", str(run_config), *best, *more, "--max_steps=3"]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    assert state["best_global_step"] == 1
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| step 1, the best, kept here |" in card
    row = next(line for line in card.splitlines() if line.startswith("| loss |"))
    assert float(row.split("|")[3]) == pytest.approx(losses[1], rel=1e-2)
    assert losses[3] < 0.98 * losses[1]


@pytest.mark.parametrize(
    ("adapter", "strategy"),
    [
        pytest.param(False, "every_save", id="model"),
        pytest.param(True, "every_save", id="adapter"),
        pytest.param(False, "checkpoint", id="last checkpoint"),
        pytest.param(True, "all_checkpoints", id="all checkpoints"),
    ],
)
def test_a_push_shares_no_pickle_and_no_path(run_config, tmp_path, monkeypatch, adapter, strategy):
    pushed: list[dict[str, bytes]] = []
    checkpoints: dict[str, dict[str, bytes]] = {}

    def upload(self, *, folder_path, run_as_future=False, **kwargs):
        folder = Path(folder_path)
        files = [path for path in folder.rglob("*") if path.is_file()]
        content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        if "path_in_repo" in kwargs:
            checkpoints[kwargs["path_in_repo"]] = content
        else:
            pushed.append(content)
        done: Future[None] = Future()
        done.set_result(None)
        return done if run_as_future else None

    monkeypatch.setattr(Hub, "upload_folder", upload)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: Hub())
    (tmp_path / "run").mkdir()
    stale = "model.safetensors" if adapter else "adapter_model.safetensors"
    for name in (stale, "secret.env"):
        (tmp_path / "run" / name).write_text("")
    changes = ["--push_to_hub=true", "--save_strategy=steps", "--save_steps=1"]
    changes += [f"--hub_strategy={strategy}"]
    changes += ["--use_peft=true", "--merge_adapter=true"] if adapter else []
    assert main(["train", str(run_config), *changes]) == 0
    assert len(pushed) == 3
    assert all("run.json" in files for files in pushed)
    names = {
        "every_save": [], "checkpoint": ["last-checkpoint"],
        "all_checkpoints": ["checkpoint-1", "checkpoint-2"],
    }  # fmt: skip
    assert sorted(checkpoints) == names[strategy]
    assert all("trainer_state.json" in files for files in checkpoints.values())
    for files in [*pushed, *checkpoints.values()]:
        assert not [name for name in files if Path(name).suffix in (".pt", ".pth", ".bin")]
        assert ("adapter_model.safetensors" in files) is adapter
        assert ("model.safetensors" in files) is not adapter
        assert not {"training_args.bin", "secret.env"} & set(files)
        assert not [name for name, text in files.items() if str(tmp_path).encode() in text]
    assert ("merged/model.safetensors" in pushed[-1]) is adapter
    left = [path.name for path in (tmp_path / "run").iterdir()]
    assert not [name for name in left if name.startswith(("_upload", "training_args"))]
    assert str(tmp_path) in (tmp_path / "run" / "run.json").read_text()


def test_a_push_has_everything(run_config, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    assert main(["train", str(run_config), "--push_to_hub=true", "--hub_strategy=end"]) == 0
    (uploaded,) = hub.uploads
    assert {"README.md", "report.html", "run.json", "model.safetensors"} <= set(uploaded)


def test_a_hub_that_goes_away_costs_nothing(run_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: Hub("upload_folder"))
    assert main(["train", str(run_config), "--push_to_hub=true"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "was not pushed; hf upload someone/run" in errors[0]
    assert "Connection refused" in errors[0]
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"README.md", "report.html", "run.json", "model.safetensors"} <= kept


def test_a_hub_that_is_away_is_said_before_training(run_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: Hub("create_repo"))
    assert main(["train", str(run_config), "--push_to_hub=true"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "push_to_hub: log in with hf auth login, or set it to false; the repo" in errors[0]
    assert not (tmp_path / "run" / "model.safetensors").exists()
