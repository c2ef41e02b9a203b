"""A program that uses an NPU as its documentation says, and knows nothing of emulation.

python torch_npu_tour.py npu|cpu RESULTS.json
"""

import contextlib
import json
import sys

import torch
from torch import nn

if sys.argv[1] == "npu":
    import torch_npu  # noqa: F401

DEVICE = torch.device(f"{sys.argv[1]}:0" if sys.argv[1] == "npu" else "cpu")


def round_trip():
    x = torch.linspace(-3, 3, 64).reshape(8, 8)
    there = x.to(DEVICE)
    assert there.device.type == DEVICE.type
    return (there @ there.T).cpu().flatten()[:4].tolist()


def train_mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)).to(DEVICE)
    x, target = torch.randn(64, 16).to(DEVICE), torch.randint(0, 4, (64,)).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    return losses


def conv_net():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    with torch.no_grad():
        return model.to(DEVICE).eval()(torch.randn(2, 3, 16, 16).to(DEVICE)).cpu().flatten().tolist()


def autocast_block():
    torch.manual_seed(2)
    model, x = nn.Linear(32, 8).to(DEVICE), torch.randn(4, 32).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = model(x)
        z = torch.softmax(y.float(), -1)
    assert y.dtype is torch.bfloat16
    return [*y.float().flatten().tolist(), *z.flatten().tolist()]


def event_timing():
    if DEVICE.type == "cpu":
        return
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    x = torch.randn(256, 256, device=DEVICE)
    start.record()
    for _ in range(10):
        x = x @ x / 256
    end.record()
    torch.npu.synchronize()
    assert 0 < start.elapsed_time(end) < 60_000


def memory_statistics():
    if DEVICE.type == "cpu":
        return
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    block = torch.empty(4 << 20, dtype=torch.uint8, device=DEVICE)
    assert torch.npu.memory_allocated() - before >= 4 << 20
    assert torch.npu.max_memory_allocated() >= torch.npu.memory_allocated()
    assert torch.npu.memory_reserved() >= torch.npu.memory_allocated()
    free, total = torch.npu.mem_get_info()
    assert 0 < free < total
    del block
    assert torch.npu.memory_allocated() == before
    assert "allocated_bytes.all.peak" in torch.npu.memory_stats()


def pinned_loader():
    data = torch.utils.data.TensorDataset(torch.arange(24.0).reshape(12, 2), torch.arange(12))
    loader = torch.utils.data.DataLoader(data, batch_size=4, pin_memory=DEVICE.type == "npu")
    sums = []
    for x, y in loader:
        assert x.is_pinned() == (DEVICE.type == "npu")
        x, y = x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)
        sums.append((x.sum(1) * y).sum().item())
    return sums


def streams():
    stream = torch.npu.Stream() if DEVICE.type == "npu" else None
    with torch.npu.stream(stream) if stream else contextlib.nullcontext():
        y = torch.ones(3, device=DEVICE) * 2
    if stream:
        torch.npu.current_stream().wait_stream(stream)
    return y.tolist()


PARTS = (round_trip, train_mlp, conv_net, autocast_block, event_timing, memory_statistics, pinned_loader, streams)

if __name__ == "__main__":
    with open(sys.argv[2], "w") as file:
        json.dump({part.__name__: part() for part in PARTS}, file)
