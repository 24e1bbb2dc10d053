"""Tell of which replicas a checkpoint holds the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seedlora.training.replicas import FitSettings, Replica, ReplicaOptions

#: Its key in a checkpoint.
REPLICAS = "seedlora_replicas"


def replicas_record(settings: FitSettings) -> dict[str, Any]:
    """Return what tells the replicas of a fit, as plain data."""
    return {"replicas": [asdict(replica) for replica in settings.replicas]}


def stored_settings(checkpoint: Mapping[str, Any]) -> FitSettings:
    """Return the settings of the fit in which a checkpoint was taken, as far as the replicas' weights need them.

    Raises:
        ValueError: if the checkpoint does not tell them.
    """
    record = checkpoint.get(REPLICAS)
    if record is None:
        raise ValueError(
            "the checkpoint does not say whose weights it holds, so it is of an older version or of another module; "
            "go on with its run by Trainer.fit(ckpt_path=...), or load the adapter of a finished run by PEFT"
        )
    replicas = ({**each, "options": ReplicaOptions(**each["options"])} for each in record["replicas"])
    return FitSettings(tuple(Replica(**each) for each in replicas))


def check_is_file(path: object) -> None:
    """Raise ValueError if a checkpoint is a folder, which is not loaded without its Trainer."""
    if isinstance(path, str | Path) and Path(path).is_dir():
        raise ValueError(
            f"{path} is a folder. An adapter's is loaded by peft.AutoPeftModelForCausalLM.from_pretrained, a "
            "checkpoint of DeepSpeed by Trainer.fit(ckpt_path=...) with the strategy it was saved by"
        )
