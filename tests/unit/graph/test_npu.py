"""Modes for NPUs: what is refused, which guards are kept, and graphs that a restart finds on disk."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from qwen2_npu import Optimizations, Qwen2ForCausalLM, compile_model, graph
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.graph import npu
from tests.unit.small import small_config, small_stock, stock_weights

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


@pytest.mark.parametrize(("text", "expected"), [("True", True), ("false", False), ("1", True), ("0", False)])
def test_dynamic_compile_is_parsed(monkeypatch, text, expected):
    monkeypatch.setenv("DYNAMIC_COMPILE", text)
    assert graph.parse_dynamic(None, needed=False) is expected


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
    ]
    assert npu.keep_input_guards(guards) == [True, False, True, True, True, False]


@needs_torch_npu
@pytest.mark.parametrize("mode", ["torchair", "npugraph_ex"])
@pytest.mark.parametrize("chosen", [True, False])
def test_options_reach_the_compiler(model, mode, chosen, monkeypatch):
    """Guards filtered, no fallback to eager in the middle; for torchair with its own configuration."""
    import torch_npu  # noqa: F401 - puts torchair on the path
    import torchair

    compiled, backends = [], []
    monkeypatch.setattr(torch, "compile", lambda step, **given: compiled.append(given) or step)
    monkeypatch.setattr(torchair, "get_npu_backend", lambda **given: backends.append(given) or "torchair's")
    options = graph.GraphOptions(chosen, not chosen, chosen, None)
    with warnings.catch_warnings():
        compile_step = npu.compiler(mode, model, options)
    compile_step(model.decode_step)
    compile_step(model.prefill_step)
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


def test_equal_shapes_have_one_name():
    def arguments(batch=2, lengths=(3, 4)):
        return torch.zeros(batch, 1), list(lengths)

    assert npu.shape_name(arguments()) == npu.shape_name(arguments(lengths=(7, 9)))
    assert npu.shape_name(arguments()) != npu.shape_name(arguments(batch=3))
    assert npu.shape_name(arguments()) != npu.shape_name((torch.zeros(2, 1), None))


@needs_torch_npu
def test_a_fingerprint_tells_models_apart(model):
    other = Qwen2ForCausalLM(model.config, Optimizations.up_to("fused_qkv"))
    assert npu.fingerprint(model) == npu.fingerprint(model)
    assert npu.fingerprint(model) != npu.fingerprint(other)


@needs_torch_npu
@pytest.mark.parametrize("package", ["torch", "torch_npu", "transformers"])
def test_a_fingerprint_tells_versions_apart(model, package, monkeypatch):
    before = npu.fingerprint(model)
    monkeypatch.setattr(importlib.import_module(package), "__version__", "0.0")
    assert npu.fingerprint(model) != before


@needs_torch_npu
def test_a_fingerprint_tells_sources_apart(model, monkeypatch, tmp_path):
    files = [tmp_path / name for name in ("a.py", "z.py", "models/a.py", "graph/z.py", "parallel/b.py")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("1")
    monkeypatch.setattr(npu, "__file__", str(tmp_path / "graph" / "npu.py"))
    seen = {npu.fingerprint(model)}
    for file in files:
        file.write_text("2")
        seen.add(npu.fingerprint(model))
    assert len(seen) == len(files) + 1


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
    assert second["tokens"] == first["tokens"]
