"""Modes for NPUs: what is refused, which guards are kept, and graphs that a restart finds on disk."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM, compile_model, graph
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.graph import npu
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.sharding import Shard
from tests.unit.small import small_config, small_stock, stock_weights
from tests.unit.tokens import assert_same_tokens

needs_torch_npu = pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="needs torch_npu")


@pytest.fixture(scope="module")
def model():
    config = small_config(num_hidden_layers=1)
    return Qwen2ForCausalLM.from_state_dict(config, stock_weights(small_stock(config)))


@pytest.mark.parametrize("mode", ["torchair", "npugraph_ex"])
def test_a_model_that_is_on_no_npu_is_refused(model, mode):
    message = rf"mode='{mode}'.*(torch_npu, which is missing|device is cpu, whose modes are eager, inductor: take one)"
    with pytest.raises(UnsupportedError, match=message):
        compile_model(model, mode)
    assert model.compiled_steps == {}


def test_without_torch_npu_the_way_out_is_named(model, monkeypatch):
    monkeypatch.setattr(npu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="pip install torch_npu==2"):
        compile_model(model, "torchair")


@pytest.mark.parametrize("found", ["torchair", "torch_npu.dynamo.torchair", None])
def test_torchair_is_looked_for_beside_torch_npu_and_in_it(monkeypatch, found):
    monkeypatch.setattr(
        npu.importlib.util, "find_spec", lambda name: object() if name in ("torch_npu", found) else None
    )
    if found is not None:
        return npu.check_installed("torchair", ("eager",))
    with pytest.raises(UnsupportedError, match="needs torchair, which this torch_npu does not have"):
        npu.check_installed("torchair", ("eager",))


def test_the_guides_word_for_graph_mode_is_torchair(monkeypatch):
    monkeypatch.setenv("EXE_MODE", "dynamo")
    assert graph.parse_mode(None) == "torchair"
    assert graph.parse_mode("eager") == "eager"


@pytest.mark.parametrize(("text", "expected"), [("True", True), ("false", False), ("1", True), ("0", False)])
def test_dynamic_compile_is_parsed(monkeypatch, text, expected):
    monkeypatch.setenv("DYNAMIC_COMPILE", text)
    assert graph.parse_dynamic(None, needed=False) is expected
    assert graph.parse_dynamic(not expected, needed=False) is not expected  # what is passed comes first


def test_dynamic_compile_is_never_evaluated(monkeypatch):
    monkeypatch.setenv("DYNAMIC_COMPILE", "__import__('os').getpid()")
    with pytest.raises(UnsupportedError, match="must be True or False"):
        graph.parse_dynamic(None, needed=False)


def test_static_graphs_with_live_lengths_are_refused():
    assert graph.parse_dynamic(None, needed=True) is True
    with pytest.raises(UnsupportedError, match=r"dynamic=False.*ifa_tiling"):
        graph.parse_dynamic(False, needed=True)


def test_a_graph_cache_is_torchairs_alone(model, tmp_path):
    with pytest.raises(UnsupportedError, match="only torchair keeps graphs on disk"):
        compile_model(model, "inductor", cache_dir=tmp_path)
    with pytest.raises(UnsupportedError, match="only mode='torchair' keeps graphs on disk"):
        npu.compiler("npugraph_ex", model, graph.GraphOptions(True, True, True, tmp_path))


def test_guards_on_inputs_stay_and_those_on_the_model_go():
    def guard(name, kind="TENSOR_MATCH", is_global=False):
        return SimpleNamespace(name=name, guard_type=kind, is_global=is_global)

    guards = [
        guard("L['tokens']"),
        guard("L['self']._modules['norm'].eps"),
        guard("L['self']._modules['rotary']._buffers['cos']"),  # may grow
        guard("L['self']._modules['rotary']._buffers['sin']"),
        guard("", "SHAPE_ENV"),
        guard("G['torch']", is_global=True),
        guard("self._modules['norm'].eps"),
        guard("type(self._modules['layers']._modules['0']._modules['self_attn']).forward"),
        guard("self._modules['rotary']._buffers['sin']"),
        guard("tokens"),
        guard("inputs.actual_seq_lengths[0]"),
        guard("caches[0][1]"),
    ]
    kept = [True, False, True, True, True, False, False, False, True, True, True, True]
    assert npu.keep_input_guards(guards) == kept


@needs_torch_npu
@pytest.mark.parametrize("mode", ["torchair", "npugraph_ex"])
@pytest.mark.parametrize("chosen", [True, False])
def test_options_reach_the_compiler(model, mode, chosen, monkeypatch):
    """Guards filtered, no fallback to eager in the middle, no code that another model's graphs are kept with; for
    torchair with its own configuration."""
    import torch_npu  # noqa: F401 - puts torchair on the path
    import torchair

    compiled, backends = [], []
    monkeypatch.setattr(torch, "compile", lambda step, **given: compiled.append(given) or step)
    monkeypatch.setattr(torchair, "get_npu_backend", lambda **given: backends.append(given) or "torchair's")
    options = graph.GraphOptions(chosen, not chosen, chosen, None)
    with warnings.catch_warnings():
        compile_step = npu.compiler(mode, model, options)
    given_steps = [model.decode_step, model.decode_step, model.prefill_step]
    made = [compile_step(step) for step in given_steps]
    assert all(step.__self__ is model for step in made)
    assert len({id(step.__code__) for step in (*made, *given_steps)}) == 3 + 2
    for given in compiled:
        assert given == {
            "backend": "torchair's" if mode == "torchair" else "npugraph_ex",
            "dynamic": chosen,
            "fullgraph": True,
            "options": {"guard_filter_fn": npu.keep_input_guards},
        }
    assert len(backends) == 1
    if mode == "torchair":
        experimental = backends[0]["compiler_config"].experimental_config
        assert experimental.frozen_parameter.value == ("1" if not chosen else "0")
        assert experimental.tiling_schedule_optimize.value == ("1" if chosen else "0")
        assert backends[0]["compiler_config"].post_grad_custom_post_pass.value is npu.drop_layout_copies


@needs_torch_npu
@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "on disk"])
def test_graphs_are_those_of_the_model_its_ranks_and_options(kept, size, chosen, tmp_path, monkeypatch):
    """Kept on disk or not; there in a folder of this model, whose graphs are read back without guards."""
    import torch_npu  # noqa: F401 - puts torchair on the path
    import torchair

    configs = []
    monkeypatch.setattr(torchair, "get_npu_backend", lambda compiler_config: configs.append(compiler_config))
    monkeypatch.setattr(torch, "compile", lambda step, **given: step)
    model = Qwen2ForCausalLM(small_config(num_hidden_layers=1))
    model.ranks = Ranks(Shard(0, size))
    options = graph.GraphOptions(chosen, not chosen, chosen, tmp_path if kept else None)
    with warnings.catch_warnings():
        step = npu.compiler("torchair", model, options)(model.decode_step)
    if kept:
        configs = [step.config]
        assert (step.step, step.dynamic, step.folder) == (model.decode_step, chosen, tmp_path / npu.fingerprint(model))
    (found,) = (config.experimental_config for config in configs)
    assert (found.topology_sorting_strategy.value == "StableRDFS") == (size > 1)
    assert found.frozen_parameter.value == ("0" if chosen else "1")
    assert found.tiling_schedule_optimize.value == ("1" if chosen else "0")


def test_equal_shapes_have_one_name():
    def arguments(batch=2, lengths=(3, 4)):
        return torch.zeros(batch, 1), list(lengths)

    assert npu.shape_name(arguments()) == npu.shape_name(arguments(lengths=(7, 9)))
    assert npu.shape_name(arguments()) != npu.shape_name(arguments(batch=3))
    assert npu.shape_name(arguments()) != npu.shape_name((torch.zeros(2, 1), None))


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 8).t(),
        torch.zeros(8, 2, dtype=torch.int64),
        torch.zeros(8, 2, device="meta"),
        torch.zeros(8, 3),
        [torch.zeros(8, 2)],
        None,
        3,
    ],
    ids=["strides", "dtype", "device", "shape", "structure", "none", "a number"],
)
def test_other_inputs_have_other_names(other):
    """A graph that is read back has no guards: its name is all that tells it from another one."""
    names = [npu.shape_name((given, 5)) for given in (torch.zeros(8, 2), torch.ones(8, 2), other)]
    assert names[0] == names[1] != names[2]


@needs_torch_npu
def test_a_graph_on_disk_is_of_one_shape_and_one_rotary_table(tmp_path, monkeypatch):
    import torch_npu  # noqa: F401 - puts torchair on the path
    import torchair.inference

    made = []
    monkeypatch.setattr(
        torchair.inference, "cache_compile", lambda step, **given: made.append((step.__name__, given)) or step
    )

    class Model:
        model = SimpleNamespace(rotary=SimpleNamespace(cos=torch.zeros(64, 4)))

        def step(self, tokens):
            return tokens + 1

    owner, folder = Model(), tmp_path / "graphs"
    step = npu.CachedStep(owner.step, "a configuration", True, folder)
    for rows in (64, 128):
        Model.model.rotary.cos = torch.zeros(rows, 4)
        for width in (8, 8, 16):
            assert torch.equal(step(torch.ones(1, width)), torch.full((1, width), 2.0))
    assert len(made) == len({given["cache_dir"] for _, given in made}) == len({name for name, _ in made}) == 4
    for name, given in made:
        assert given == {"config": "a configuration", "dynamic": True, "cache_dir": given["cache_dir"]}
        assert Path(given["cache_dir"]).parent == folder
        assert name == f"step_{Path(given['cache_dir']).name}"
    assert folder.stat().st_mode & 0o777 == 0o700, "a folder of code that others may write"


@needs_torch_npu
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_run_their_collectives_in_one_order(size):
    """Else they wait for each other for ever."""
    config = npu.compiler_config(graph.GraphOptions(True, True, True, None), Ranks(Shard(0, size)))
    strategy = config.experimental_config.topology_sorting_strategy.value
    assert (strategy == "StableRDFS") == (size > 1)


@needs_torch_npu
@pytest.mark.parametrize(
    "change",
    [
        lambda model, patch: setattr(model, "optimizations", Optimizations.up_to("fused_qkv")),
        lambda model, patch: setattr(model.config, "rms_norm_eps", 0.5),
        lambda model, patch: model.bfloat16(),
        lambda model, patch: setattr(model, "ranks", Ranks(Shard(1, 2))),
        lambda model, patch: setattr(model, "ranks", Ranks(Shard(0, 1))),
        lambda model, patch: patch.setattr(npu.torch, "__version__", "0"),
        lambda model, patch: patch.setattr(npu, "transformers", SimpleNamespace(__version__="0")),
    ],
    ids=["optimizations", "a constant", "dtype", "rank", "number of ranks", "torch", "transformers"],
)
def test_a_fingerprint_tells_models_and_versions_apart(change, monkeypatch):
    model = Qwen2ForCausalLM(small_config(num_hidden_layers=1))
    model.ranks = Ranks(Shard(0, 2))
    before = npu.fingerprint(model)
    assert npu.fingerprint(model) == before
    change(model, monkeypatch)
    assert npu.fingerprint(model) != before


@needs_torch_npu
@pytest.mark.parametrize(
    "source",
    [
        "cache.py",
        "models/attention.py",
        "graph/layout_copies.py",
        "parallel/collectives.py",
        "ops/linear.py",
        "ops/attention/layouts.py",
    ],
)
def test_a_fingerprint_tells_sources_apart(model, source, monkeypatch):
    """All that a graph is traced from."""
    before, right = npu.fingerprint(model), Path.read_bytes
    changed = Path(npu.__file__).parents[1] / source
    assert changed.exists()
    monkeypatch.setattr(Path, "read_bytes", lambda path: right(path) + (b" " if path == changed else b""))
    assert npu.fingerprint(model) != before


@needs_torch_npu
@pytest.mark.parametrize("package", ["torch", "torch_npu", "transformers"])
def test_a_fingerprint_tells_versions_apart(model, package, monkeypatch):
    before = npu.fingerprint(model)
    monkeypatch.setattr(importlib.import_module(package), "__version__", "0.0")
    assert npu.fingerprint(model) != before


SCRIPT = """
import json, sys
from qwen2_npu import emulator
emulator.activate_where_needed()
import torch
torch.set_num_threads(1)
from torch._dynamo.utils import counters
from qwen2_npu import Qwen2ForCausalLM, compile_model
from tests.unit.small import small_config, small_stock, stock_weights
config = small_config(num_hidden_layers=1)
model = Qwen2ForCausalLM.from_state_dict(config, stock_weights(small_stock(config)), device="npu")
compile_model(model, "torchair", cache_dir=sys.argv[1])
tokens = []
for batch in (2, 3):
    ids = torch.arange(1, 8).repeat(batch, 1).npu()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    tokens.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist())
print(json.dumps({"tokens": tokens, "traced": counters["stats"]["unique_graphs"]}))
"""


@needs_torch_npu
@pytest.mark.slow
def test_a_restart_compiles_nothing_that_is_on_disk(tmp_path):
    def run():
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "graphs")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    first, second = run(), run()
    assert first["traced"] == 4  # prefill and decode of two batches
    assert second["traced"] == 0
    for found, expected in zip(second["tokens"], first["tokens"], strict=True):
        assert_same_tokens(torch.tensor(found), torch.tensor(expected))
