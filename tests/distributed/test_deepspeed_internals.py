"""What is used of DeepSpeed beyond its documentation is still there: one test for each use, named after it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import torch

from seedlora.distributed import deepspeed_internals
from seedlora.distributed.strategies import CPUDeepSpeedStrategy


class TestDeepSpeed:
    def test_skip_shared_memory_extension(self):
        # Of DeepSpeed's own, in a process of its own: it asks what can be built, once.
        lines = (
            "import os; os.environ['DS_ACCELERATOR'] = 'cpu'",
            "from seedlora.distributed.deepspeed_internals import skip_shared_memory_extension",
            "skip_shared_memory_extension()",
            "import deepspeed, importlib, inspect; backend = importlib.import_module('deepspeed.comm.torch')",
            "assert deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] is False",
            "assert 'deepspeed.ops.__compatible_ops__.get' in inspect.getsource(backend)",
        )
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_is_partitioned_parameter(self):
        from deepspeed.runtime.zero import partition_parameters

        parameter = torch.nn.Parameter(torch.zeros(2))
        assert not deepspeed_internals.is_partitioned_parameter(parameter)
        parameter.ds_id = 0
        assert deepspeed_internals.is_partitioned_parameter(parameter)
        assert "param.ds_id = " in inspect.getsource(partition_parameters)

    def test_is_last_micro_batch(self):
        from deepspeed.runtime.engine import DeepSpeedEngine

        assert callable(DeepSpeedEngine.is_gradient_accumulation_boundary)
        assert isinstance(CPUDeepSpeedStrategy.deepspeed_engine, property)
        engine = SimpleNamespace(is_gradient_accumulation_boundary=lambda: True)
        assert deepspeed_internals.is_last_micro_batch(SimpleNamespace(deepspeed_engine=engine))

    def test_local_gradient_under_zero_3(self):
        from deepspeed.runtime.zero import stage3

        assert "p._z3_optimizer = self" in inspect.getsource(stage3)
        method = stage3.DeepSpeedZeroOptimizer_Stage3._get_fp32_grad_state_partition
        assert list(inspect.signature(method).parameters) == ["self", "param", "release_swap_buffers"]

    def test_local_gradient_under_zero_2(self):
        from deepspeed.utils import mixed_precision_linkage
        from deepspeed.utils.tensor_fragment import tensor_fragment

        source = inspect.getsource(mixed_precision_linkage)
        for name in ("_hp_mapping", "_index_in_param_group"):
            assert f"lp_param.{name} = " in source
        assert "_hp_mapping = None" in source  # of a parameter that is another rank's
        method = tensor_fragment.get_lp_grad_fragment
        assert len(inspect.signature(method).parameters) == 2

    def test_destroy_engine(self):
        from deepspeed.runtime.engine import DeepSpeedEngine

        assert callable(DeepSpeedEngine.destroy)
        ended = []
        module = torch.nn.Linear(1, 1)
        deepspeed_internals.destroy_engine(module)
        module.destroy = lambda: ended.append(True)
        deepspeed_internals.destroy_engine(module)
        assert ended == [True]
