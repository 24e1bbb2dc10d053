"""Two processes give the fused adapter of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from seedlora.adapter import read_adapter

ROOT = Path(__file__).parents[1]


def test_two_ddp_processes_give_the_adapter_of_one(tiny_llama, tmp_path):
    common = [
        *("--model.base_model", tiny_llama, "--model.dtype", "float32", "--trainer.accelerator", "cpu"),
        *("--data.num_train", "48", "--data.num_val", "8", "--data.num_test", "13"),
    ]
    for name, options in (
        ("one", ["--data.batch_size", "4"]),
        ("two", ["--data.batch_size", "2", "--trainer.devices", "2", "--trainer.strategy", "ddp"]),
    ):
        command = [sys.executable, str(ROOT / "train.py"), *common, *options, "--ensemble.dirpath", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    one, two = (read_adapter(tmp_path / name / "fused").layers for name in ("one", "two"))
    for path, factors in one.items():
        a, b = factors.dense(), two[path].dense()
        assert ((a - b).norm() / a.norm()).item() < 1e-5
    scores = [json.loads((tmp_path / name / "results.json").read_text())["scores"] for name in ("one", "two")]
    assert scores[0] == scores[1]
