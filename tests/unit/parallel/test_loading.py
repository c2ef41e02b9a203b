"""A rank reads its part of a checkpoint and nothing else, and one tensor at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint import weights
from qwen2_npu.checkpoint.sources import StateDictSource, open_checkpoint, part_of, whole
from qwen2_npu.checkpoint.weights import FUSED, held_shapes
from qwen2_npu.conformance.accuracy.stock import HEAD_DIM_IS_FREE
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.sharding import Cutting, Shard
from tests.unit.parallel.virtual import sharded
from tests.unit.small import small_config, small_stock, stock_weights

pytestmark = pytest.mark.skipif(
    not HEAD_DIM_IS_FREE, reason="transformers 4.37 ties the head counts to the hidden size"
)

CONFIG = small_config(num_attention_heads=8, num_key_value_heads=2, head_dim=16, intermediate_size=64, vocab_size=200)
RANKS = 4


class Counting:
    """A source that takes down how much it yields, and how many of its tensors are alive at once."""

    def __init__(self, source: Any) -> None:
        self.source, self.config = source, source.config
        self.shapes, self.stored_dtype = source.shapes, source.stored_dtype
        self.elements: dict[str, int] = {}

    def tensors(self, cut: Cutting = whole) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.source.tensors(cut):
            self.elements[name] = tensor.numel()
            yield name, tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    Qwen2ForCausalLM.from_state_dict(CONFIG, stock_weights(small_stock(CONFIG))).save_pretrained(path)
    return path


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_only_the_ranks_slices_are_read(folder: Path, kind: str, rank: int) -> None:
    state = stock_weights(small_stock(CONFIG))
    source = Counting(open_checkpoint(folder) if kind == "file" else StateDictSource(CONFIG, state))
    shard = Shard(rank, RANKS)
    weights.build(lambda: Qwen2ForCausalLM(CONFIG, None, Ranks(shard)), source, dtype=None, device=torch.device("cpu"))
    expected = {name: torch.Size(shape).numel() for name, shape in held_shapes(CONFIG, shard).items()}
    assert source.elements == expected
    every = sum(tensor.numel() for tensor in state.values())
    norms = sum(tensor.numel() for name, tensor in state.items() if "norm" in name)
    kv = sum(tensor.numel() for name, tensor in state.items() if "k_proj" in name or "v_proj" in name)
    # Two ranks hold every kv head.
    assert sum(source.elements.values()) == (every - norms - kv) // RANKS + norms + kv // 2


@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["apart", "fused"])
@pytest.mark.parametrize("rank", range(RANKS))
def test_parameters_are_the_slices(folder: Path, optimizations: Optimizations, rank: int) -> None:
    """Bit for bit, wherever they come from; a fused product has the parts of its rank one after the other."""
    state, shard = stock_weights(small_stock(CONFIG)), Shard(rank, RANKS)
    from_memory = sharded(CONFIG, state, Ranks(shard), optimizations)
    from_file = Qwen2ForCausalLM.from_pretrained(folder, tp_size=RANKS, tp_rank=rank, optimizations=optimizations)
    for name, parameter in from_memory.named_parameters():
        *scope, module, kind = name.split(".")
        names = [".".join([*scope, part, kind]) for part in FUSED.get(module, (module,))]
        expected = torch.cat([part_of(state[each], shard.slice_of(each, CONFIG)) for each in names])
        assert torch.equal(parameter, expected), name
        assert torch.equal(from_file.get_parameter(name), expected), name


PEAK = """
import json, sys
from qwen2_npu import Qwen2ForCausalLM
from qwen2_npu.checkpoint import sources

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

folder, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
Qwen2ForCausalLM.from_pretrained(sys.argv[4], tp_size=1)  # what is loaded once: modules, thread pools
right, before, found = sources.SafetensorsSource.tensors, anonymous(), {"read": 0, "beyond": 0, "largest": 0}

def tensors(self, cut=sources.whole):
    for name, tensor in right(self, cut):
        found["beyond"] = max(found["beyond"], anonymous() - before - found["read"])
        found["largest"] = max(found["largest"], tensor.nbytes)
        yield name, tensor
        found["read"] += tensor.nbytes

sources.SafetensorsSource.tensors = tensors
model = Qwen2ForCausalLM.from_pretrained(folder, tp_size=ranks, tp_rank=rank)
found["held"] = sum(parameter.nbytes for parameter in model.parameters())
found["after"] = anonymous() - before
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_part_and_one_tensor(folder: Path, tmp_path: Path) -> None:
    """The memory that a process has for itself; pages of the file are the system's."""
    config = small_config(
        hidden_size=512, num_attention_heads=8, num_key_value_heads=4, intermediate_size=1024, vocab_size=16384
    )
    Qwen2ForCausalLM.from_state_dict(config, stock_weights(small_stock(config))).save_pretrained(tmp_path)
    command = [sys.executable, "-c", PEAK, str(tmp_path), "1", str(RANKS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    found = json.loads(done.stdout.splitlines()[-1])
    slack = 2 * 2**20  # allocator, and pages that are touched in part; the whole of the largest tensor is 32 MiB
    assert found["read"] == found["held"]
    assert found["beyond"] <= found["largest"] + slack, found
    assert found["after"] <= found["held"] + slack, found
