"""Runs over two nodes: two agents of torchrun, or two tasks of SLURM, on the loopback address, with a shared folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from seedlora.adapters.reading import read_adapter
from tests.helpers.paths import ROOT

#: A run of ten steps, with a checkpoint at every one.
SMALL = [
    *("--model.dtype", "float32", "--model.r", "2", "--ensemble.seeds", "[1,2]", "--ensemble.budget", "full"),
    *("--ensemble.checkpoint_every_n_steps", "1", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"),
    *(
        "--trainer.enable_progress_bar",
        "false",
        "--data.num_train",
        "40",
        "--data.num_val",
        "4",
        "--data.num_test",
        "6",
    ),
]
STRATEGIES = {"ddp": "ddp", "zero2": "deepspeed_stage_2", "fsdp2": "fsdp2"}
#: Seconds after which docs/scale.md says that the other node has ended, over gloo.
ENDS_WITHIN = 60


def train_words(base: str, run: Path, *more: str) -> list[str]:
    return [str(ROOT / "train.py"), "--model.base_model", base, *SMALL, "--ensemble.dirpath", str(run), *more]


def on_two_nodes(strategy: str) -> list[str]:
    """Return the options of docs/scale.md for two nodes of one device each, with half the rows on each."""
    words = ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", STRATEGIES[strategy]]
    return [*words, "--data.batch_size", "2"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Nodes(list[subprocess.Popen[str]]):
    """The launchers of a run, one for each node, each with a process group of its own."""

    def start(self, words: Sequence[str], environment: dict[str, str]) -> None:
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "TORCHELASTIC"))}
        self.append(
            subprocess.Popen(
                [sys.executable, *words],
                env={**plain, "OMP_NUM_THREADS": "1", **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )

    def kill(self, node: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self[node].pid, signal.SIGKILL)

    def finish(self) -> list[str]:
        """Wait for their end; return what each printed."""
        try:
            return [node.communicate(timeout=500)[0] for node in self]
        finally:
            for node in range(len(self)):
                self.kill(node)


def torchrun(words: Sequence[str]) -> Nodes:
    nodes, port = Nodes(), free_port()
    for rank in (0, 1):
        where = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
        where += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        nodes.start(["-m", "torch.distributed.run", *where, *words], {})
    return nodes


def slurm(words: Sequence[str]) -> Nodes:
    """Start what ``srun`` starts, with the variables that it sets."""
    nodes, port = Nodes(), free_port()
    for rank in (0, 1):
        said = {"JOB_ID": "17", "JOBID": "17", "JOB_NAME": "seedlora", "NTASKS": "2", "NTASKS_PER_NODE": "1"}
        said |= {"JOB_NUM_NODES": "2", "NNODES": "2", "PROCID": str(rank), "NODEID": str(rank), "LOCALID": "0"}
        said |= {"JOB_NODELIST": "127.0.0.1", "NODELIST": "127.0.0.1"}
        environment = {f"SLURM_{key}": value for key, value in said.items()}
        nodes.start(words, environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    return nodes


@pytest.fixture(scope="module")
def one(tiny_llama, tmp_path_factory):
    """The folder of a run of one process with the same rows in a step."""
    run = tmp_path_factory.mktemp("one") / "run"
    words = [sys.executable, *train_words(tiny_llama, run, "--data.batch_size", "4")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return run


def assert_same(run: Path, one: Path) -> None:
    for name in ("seed_1", "seed_2", "fused"):
        found, wanted = read_adapter(run / name).layers, read_adapter(one / name).layers
        for path, factors in wanted.items():
            difference = (found[path].dense() - factors.dense()).norm() / factors.dense().norm()
            assert float(difference) < 1e-5, (name, path)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [torchrun, slurm])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lost_node_ends_the_other_and_the_run_goes_on_to_the_adapter_of_one_process(
    strategy, launch, tiny_llama, one, tmp_path
):
    run = tmp_path / "run"
    nodes = launch(train_words(tiny_llama, run, *on_two_nodes(strategy)))
    until = time.monotonic() + 300
    while not list(run.glob("checkpoints/*/step=[4-9].ckpt")):
        assert all(node.poll() is None for node in nodes), nodes.finish()
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.01)
    nodes.kill(1)
    try:
        nodes[0].wait(timeout=ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        nodes.kill(0)
        pytest.fail(f"the other node did not end within {ENDS_WITHIN} s: {nodes[0].communicate()[0]}")
    printed, _ = nodes[0].communicate()
    assert nodes[0].returncode != 0
    assert "stopped" in printed, printed
    assert not (run / "fused").exists()
    again = launch(train_words(tiny_llama, run, *on_two_nodes(strategy), "--resume"))
    printed = again.finish()
    assert [node.returncode for node in again] == [0, 0], printed
    assert "Going on from" in printed[0]
    assert_same(run, one)
