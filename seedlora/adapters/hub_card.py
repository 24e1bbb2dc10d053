"""Make the card of an adapter on a hub: metadata that the hub accepts, over the text of the folder's own card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seedlora.adapters.model_card import CARD_NAME
from seedlora.adapters.public_base import PublicBase, UploadError
from seedlora.adapters.servers import vllm_rank
from seedlora.records.results import RESULTS
from seedlora.records.settings import SETTINGS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

#: What a base model's card says of its licence.
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class RunFacts:
    """Hold what the run around an adapter says of it; nothing where there is no run.

    Args:
        settings: of the training.
        results: of the test.
    """

    settings: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def dataset(self) -> str | None:
        """Return the hub id of the data set that it was trained on, if it has one."""
        from seedlora import datamodules  # it brings Lightning, which would cost every --help seconds

        module = getattr(datamodules, str(self.settings.get("data")), None)
        field = "hub_of_chats" if self.settings.get("data.multi_turn") else "hub"
        return getattr(module, field, None)


def run_facts(folder: Path) -> RunFacts:
    """Read what the run around an adapter says.

    Raises:
        ValueError: if a file of it cannot be read.
    """
    run = folder.absolute().parent
    settings = SETTINGS.read(run)
    return RunFacts({}, {}) if settings is None else RunFacts(settings, RESULTS.read(run) or {})


def hub_card(
    folder: Path, repo: str, *, base: PublicBase, run: RunFacts, licence: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    """Return the text of the card; paths of this machine may still be in it.

    Metadata that the folder's own card has is kept, but for the base model.

    Args:
        folder: of the adapter.
        repo: where it goes, ``owner/name``.
        base: its base model.
        run: what the run around it says.
        licence: what the base model's card says of its licence; nothing if that is not known.
        config: what ``adapter_config.json`` says.

    Raises:
        UploadError: if the folder's card has metadata that is no YAML.
    """
    from huggingface_hub import ModelCard, ModelCardData

    try:
        card = ModelCard((folder / CARD_NAME).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except FileNotFoundError:
        card = ModelCard(f"# {repo.partition('/')[2]}\n")
    except ValueError as error:
        raise UploadError(f"{folder / CARD_NAME} has metadata that cannot be read: {error}") from None
    data = card.data
    assert isinstance(data, ModelCardData)
    data.base_model = base.name if base.is_hub_id else None
    data.library_name = data.library_name or "peft"
    data.tags = list(dict.fromkeys([*(data.tags or []), "lora", "seedlora"]))
    if config.get("task_type") == "CAUSAL_LM" and not data.pipeline_tag:
        data.pipeline_tag = "text-generation"
    if run.dataset is not None and not data.datasets:
        data.datasets = [run.dataset]
    if not data.license:
        for key in _LICENCE:
            setattr(data, key, licence.get(key))
    if (score := _score(folder.absolute().name, run)) is not None:
        data.model_name, data.eval_results = repo.partition("/")[2], [score]
    parts = [f"---\n{data.to_yaml()}\n---", card.text.strip()]
    parts += [] if base.is_hub_id else [base.sentence]
    return "\n\n".join([*parts, _use(repo, base, config)]) + "\n"


def _score(label: str, run: RunFacts) -> EvalResult | None:
    """Return the adapter's score of the run's own test, as the hub's model index has it."""
    from huggingface_hub import EvalResult

    score, kind = (run.results.get("scores") or {}).get(label), run.settings.get("data")
    if score is None or not kind:
        return None
    task = run.settings.get("data.task")
    metric = str(run.results["metric"])
    return EvalResult(
        task_type="text-generation",
        dataset_type=run.dataset or kind.lower(),
        dataset_name=f"{kind} {task}" if task else kind,
        dataset_split="test",
        metric_type=metric.partition(",")[0].strip().replace(" ", "_"),
        metric_name=f"{metric}, n = {score['n']}, 95 % interval {score['low']:.4f} to {score['high']:.4f}",
        metric_value=round(score["value"], 4),
    )


def _use(repo: str, base: PublicBase, config: Mapping[str, Any]) -> str:
    """Return the section that says how to load and serve it."""
    name = base.name if base.is_hub_id else "BASE_MODEL"
    lines = [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}"), "{repo}")',
        "```",
    ]
    rank = vllm_rank(config["r"])
    if config.get("task_type") != "CAUSAL_LM" or rank is None:
        return "\n".join(lines if config.get("task_type") == "CAUSAL_LM" else [])
    serve = f"vllm serve {name} --enable-lora --max-lora-rank {rank} --lora-modules {repo.partition('/')[2]}={repo}"
    return "\n".join([*lines, "", "```sh", serve, "```"])


def licence_of(base: PublicBase, *, seconds: float = 10.0) -> dict[str, Any]:
    """Return what the base model's card says of its licence: in its folder, or on the hub; nothing if it is not known.

    Args:
        base: the base model.
        seconds: to wait for the hub.
    """
    from huggingface_hub import HfApi, ModelCard

    try:
        if (file := Path(base.private) / CARD_NAME).is_file():
            found = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
        elif base.is_hub_id and (data := HfApi().model_info(base.name, timeout=seconds).card_data) is not None:
            found = data.to_dict()
        else:
            return {}
    except Exception:  # the hub's libraries raise errors of many kinds, and a licence is no reason to stop
        return {}
    return {key: found[key] for key in _LICENCE if found.get(key)}
