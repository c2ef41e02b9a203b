"""Whose time a decode step's profile shows, on every kind of device."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen2_npu import emulator
from qwen2_npu.conformance import tiny
from qwen2_npu.conformance.perf import breakdown
from qwen2_npu.conformance.perf.bench import BenchCase, Setup
from qwen2_npu.conformance.perf.builds import Weights

KERNELS = """Device_id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),Block Num
0,MatMulV2_1,MatMulV2,AI_CORE,"1764000000000001.1\t",600.5,0.0,20
0,SwiGlu_1,SwiGlu,AI_VECTOR_CORE,"1764000000000701.1\t",100.0,1.0,40
0,MatMulV2_2,MatMulV2,AI_CORE,"1764000000000901.1\t",299.5,2.0,20
0,model_send,N/A,EVENT,"1764000000000991.1\t",0.0,0,0
"""


def setup(device: str) -> Setup:
    """A short prompt on the tiny checkpoint."""
    return Setup(Weights.of_checkpoint(tiny.path()), "eager", device, torch.bfloat16, 8, 4)


class TorchNpu:
    """torch_npu as far as a profile goes: writes ``text`` where the real profiler writes its kernels."""

    def __init__(self, text: str | None) -> None:
        self.calls: list[str] = []
        self.npu = SimpleNamespace(synchronize=lambda: self.calls.append("synchronize"))
        self.profiler = SimpleNamespace(
            ProfilerActivity=SimpleNamespace(CPU="CPU", NPU="NPU"),
            ProfilerLevel=SimpleNamespace(Level1="Level1"),
            AiCMetrics=SimpleNamespace(AiCoreNone="AiCoreNone"),
            _ExperimentalConfig=lambda **named: named,
            tensorboard_trace_handler=Path,
            profile=self._profile,
        )
        self.text = text

    @contextmanager
    def _profile(self, activities: list[str], on_trace_ready: Path, experimental_config: dict[str, str]) -> Any:
        assert activities == ["CPU", "NPU"]
        assert experimental_config["profiler_level"] == "Level1"
        yield
        self.calls.append("stopped")
        if self.text is not None:
            folder = on_trace_ready / "host_1_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
            folder.mkdir(parents=True)
            (folder / breakdown.KERNELS).write_text(self.text, encoding="utf-8")


def on_an_npu(monkeypatch: pytest.MonkeyPatch, torch_npu: TorchNpu) -> breakdown.Profile:
    monkeypatch.setattr(emulator, "is_active", lambda: False)
    monkeypatch.setattr(breakdown.importlib, "import_module", {"torch_npu": torch_npu}.__getitem__)
    return breakdown.profile_of(lambda: torch_npu.calls.append("step"), "npu")


def test_on_an_npu_it_is_the_time_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_npu = TorchNpu(KERNELS)
    found = on_an_npu(monkeypatch, torch_npu)
    assert found.time == "device time of its kernels"
    assert torch_npu.calls == ["step", "synchronize", "stopped"]
    assert found.lines == [
        breakdown.Line("MatMulV2", 2, pytest.approx(0.9), pytest.approx(0.9)),
        breakdown.Line("SwiGlu", 1, pytest.approx(0.1), pytest.approx(0.1)),
    ]


def test_where_the_profiler_writes_nothing_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_npu = TorchNpu(None)
    found = on_an_npu(monkeypatch, torch_npu)
    assert found.time == "host time (torch_npu.profiler wrote no kernel_details.csv)"
    assert torch_npu.calls.count("step") == 2


def test_kernels_without_a_type_go_by_their_name(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    path.write_text("Name,Duration(us)\na,1\nb,2\na,3\n", encoding="utf-8")
    assert [(line.operator, line.calls) for line in breakdown.kernels_of(path)] == [("a", 2), ("b", 1)]


@pytest.mark.skipif(not hasattr(torch, "npu"), reason="torch_npu is not installed")
def test_torch_npu_has_what_is_asked_of_it() -> None:
    import torch_npu
    from torch_npu.profiler.analysis.prof_common_func._csv_headers import CsvHeaders
    from torch_npu.profiler.analysis.prof_view._kernel_view_parser import KernelViewParser

    fake = TorchNpu(None).profiler
    for name, value in vars(fake).items():
        for inner in vars(value) if isinstance(value, SimpleNamespace) else ():
            assert hasattr(getattr(torch_npu.profiler, name), inner)
        assert hasattr(torch_npu.profiler, name)
    assert KernelViewParser.KERNEL_VIEW == breakdown.KERNELS
    assert KERNELS.splitlines()[0].split(",") == CsvHeaders.OP_SUMMARY_KERNEL_BASE_HEADERS


def test_on_a_gpu_it_is_the_time_of_the_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(key: str, device: Any, host: float, own: float) -> Any:
        return SimpleNamespace(
            key=key, count=2, device_type=device, self_cpu_time_total=host, self_device_time_total=own
        )

    kinds = torch.autograd.DeviceType
    events = [event("aten::mm", kinds.CPU, 50.0, 300.0), event("sgemm", kinds.CUDA, 0.0, 300.0)]

    @contextmanager
    def profiled(activities: list[Any]) -> Any:
        assert torch.profiler.ProfilerActivity.CUDA in activities
        yield SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profiled)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = breakdown.profile_of(lambda: None, "cuda")
    assert found == breakdown.Profile("device time of its kernels", [breakdown.Line("sgemm", 2, 0.3, 1.0)])


def test_on_a_cpu_it_is_the_hosts() -> None:
    found = breakdown.profile(setup("cpu"), BenchCase("swiglu", 1))
    assert found.time == "host time"
    assert len(found.lines) == breakdown.LINES
    assert "aten::mm" in {line.operator for line in found.lines}


@pytest.mark.skipif(not emulator.is_active(), reason="needs the emulated NPU")
def test_on_an_emulated_npu_it_is_the_emulators() -> None:
    found = breakdown.profile(setup("npu"), BenchCase("swiglu", 1))
    assert found.time == "host time of the emulator, which says nothing about an NPU"
    assert found.lines


def test_profiles_are_not_announced_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """torch's own lines go to the process's standard error, past Python's."""
    breakdown.profile_of(lambda: torch.ones(3) + 1, "cpu")
    assert capfd.readouterr().err == ""


def test_predicted_for_the_middle_of_the_documented_run() -> None:
    from qwen2_npu.conformance.sizes import SIZES

    assert breakdown.PREDICTED_CONTEXT == 1535
    found = breakdown.predicted(SIZES["7B"], "fused_qkv", 4)
    assert len(found) > 5
    assert [part.seconds for part, _ in found] == sorted((part.seconds for part, _ in found), reverse=True)
    assert sum(" to " in ms for _, ms in found) > 2, "one number would hide what the fit cannot tell"
    for part, ms in found:
        ends = [float(end) for end in ms.split(" to ")]
        assert min(ends) - 0.005 <= part.seconds * 1e3 <= max(ends) + 0.005
    assert breakdown.predicted(SIZES["7B"], "fused_qkv", 3) == []
