"""Nothing that strangers put into rows, names and weights is run; nothing of ours goes into a folder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.cli.main import main as shell
from seedlora.cli.train import main
from seedlora.names import FUSION_NAME
from tests.helpers.adapter_folders import save_adapter
from tests.helpers.models import save_tiny_llama

SCRIPT = "<script>alert('x')</script>"
SECRET = "hf_a_secret_of_the_environment"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in the home folder, of rows and names with markup in them, with a token in the environment."""
    home = tmp_path_factory.mktemp("home")
    save_tiny_llama(home / "models" / "tiny", seed=0)
    lines = [json.dumps({"prompt": f"{i} {SCRIPT}", "response": f"{SCRIPT}{i}"}) + "\n" for i in range(40)]
    (home / "rows").mkdir()
    (home / "rows" / "train.jsonl").write_text("".join(lines))
    (home / "rows" / "asked.jsonl").write_text("".join(lines[:3]))
    where = home / "runs" / "<b>&run"
    words = ["--model.base_model", str(home / "models" / "tiny"), "--model.r", "2", "--model.dtype", "float32"]
    words += ["--data", "InstructionData", "--data.path", str(home / "rows" / "train.jsonl"), "--data.style", "plain"]
    words += ["--ensemble.seeds", "[1,2]", "--ensemble.budget", "full", "--trainer.max_epochs", "1"]
    words += ["--evaluate.task", "rows", "--evaluate.task_path", json.dumps({"rows": str(home / "rows/asked.jsonl")})]
    words += ["--evaluate.max_new_tokens", "3", "--trainer.accelerator", "cpu", "--ensemble.dirpath", str(where)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
            patch.setenv(name, SECRET)
        assert main(words) == 0
    return where


def test_own_rows_are_scored_after_training(run):
    found = json.loads((run / "evaluation" / "results.json").read_text())["tasks"]["rows"]
    assert list(found["scores"]) == ["base", "seed_1", "seed_2", "soup", "fused"]
    assert {score["n"] for score in found["scores"].values()} == {3}


def test_a_report_shows_markup_as_text(run):
    page = (run / "report.html").read_text()
    assert "&lt;" in page
    # One of the page's own; that of the rows, which are shown with their answers, is text.
    assert (page.count("<script"), "<script>alert" in page) == (1, False)
    assert "<b>&run" not in page


def test_no_secret_of_the_environment_is_in_a_run_folder(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_no_path_of_the_home_folder_is_in_a_run_folder(run):
    """But for the base model of an adapter, which PEFT has to find; ``push`` takes it out."""
    home = str(run.parents[1]).encode()
    files = [path for path in run.rglob("*") if path.is_file() and path.name != CONFIG_NAME]
    assert {"run.json", "config.yaml", "cost.json", "report.html", "README.md", FUSION_NAME} <= {f.name for f in files}
    assert [path.relative_to(run) for path in files if home in path.read_bytes()] == []
    assert json.loads((run / "run.json").read_text())["model.base_model"] == "~/models/tiny"


def test_a_run_goes_on_from_what_it_has_of_the_home_folder(run, monkeypatch, capsys):
    """``~`` in its files is the home folder again, whichever that is."""
    monkeypatch.setenv("HOME", str(run.parents[1]))
    assert main(["--config", str(run / "config.yaml"), "--resume"]) == 0
    other = run.parent / "other"
    words = [
        "--config",
        str(run / "config.yaml"),
        "--ensemble.dirpath",
        str(other),
        "--trainer.limit_train_batches",
        "1",
    ]
    assert main(words) == 0
    said = json.loads((other / "seed_1" / CONFIG_NAME).read_text())
    assert said["base_model_name_or_path"] == str(run.parents[1] / "models" / "tiny")


class _Runs:
    """Touches a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "adapter_model.bin"])
def test_a_pickle_is_not_opened(name, tmp_path, capsys):
    save_adapter(tmp_path / "a", r=2, target_modules=["q_proj"])
    (tmp_path / "a" / WEIGHTS_NAME).unlink()
    (tmp_path / "a" / name).write_bytes(pickle.dumps(_Runs(tmp_path / "ran")))
    with pytest.raises(AdapterError):
        read_adapter(tmp_path / "a")
    assert shell(["inspect", str(tmp_path / "a")]) == 2
    assert not (tmp_path / "ran").exists()
    assert pickle.loads((tmp_path / "a" / name).read_bytes()) is None
    assert (tmp_path / "ran").exists(), "or the test shows nothing"
