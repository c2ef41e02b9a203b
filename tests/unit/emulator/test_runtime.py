"""The runtime behind torch.npu: cards, memory and its limits, events, streams, versions."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qwen2_npu import emulator
from qwen2_npu.emulator import faults, runtime

MIB = 1 << 20


def test_cards():
    settings = emulator.settings()
    assert torch.npu.is_available()
    assert torch.npu.device_count() == settings.device_count
    assert torch.npu.get_device_name(1) == settings.soc
    assert torch.npu.get_device_properties(0).total_memory == settings.hbm_bytes
    assert torch.npu.can_device_access_peer(0, 1)
    with pytest.raises(RuntimeError, match=r"Invalid device ID|invalid device|does not exist"):
        torch.npu.set_device(settings.device_count)


def test_the_version_of_cann():
    from torch_npu.npu.utils import get_cann_version

    assert get_cann_version("CANN") == emulator.settings().cann


@pytest.mark.parametrize(("card", "other"), [(0, 1), (1, 0)])
def test_memory_is_counted(card, other):
    """Of each card, whichever is the current one."""
    torch.npu.empty_cache()
    before = runtime.used_bytes(other)
    allocated, used = torch.npu.memory_allocated(card), runtime.used_bytes(card)
    free = torch.npu.mem_get_info(card)[0]
    x = torch.empty(64 * MIB, dtype=torch.uint8, device=f"npu:{card}")
    assert torch.npu.memory_allocated(card) - allocated >= 64 * MIB
    assert runtime.used_bytes(card) - used >= 64 * MIB
    assert free - torch.npu.mem_get_info(card)[0] == runtime.used_bytes(card) - used
    del x
    torch.npu.empty_cache()
    assert torch.npu.memory_allocated(card) == allocated
    assert runtime.peak_bytes(card) - used >= 64 * MIB
    assert (runtime.used_bytes(card), runtime.used_bytes(other)) == (used, before)


def test_memory_ends_where_the_card_does():
    torch.npu.empty_cache()  # what tests before this one have left there needs no driver
    with faults.memory_limit(runtime.used_bytes() + 64 * MIB):
        kept = torch.ones(8 * MIB, device="npu")
        with pytest.raises(torch.OutOfMemoryError, match=r"NPU out of memory. Tried to allocate"):
            torch.empty(16 * MIB, device="npu")
        assert kept.sum().item() == 8 * MIB
        del kept
        torch.empty(12 * MIB, device="npu")  # what was freed is found again
    torch.empty(16 * MIB, device="npu")


def test_a_new_limit_shows():
    with faults.memory_limit(5 << 30):
        assert torch.npu.mem_get_info()[1] == 5 << 30
    kept = torch.empty(64 * MIB, dtype=torch.uint8, device="npu")
    with faults.memory_limit(kept.nbytes // 2):
        assert torch.npu.mem_get_info() == (0, kept.nbytes // 2)


def test_a_limit_inside_another_gives_way_to_it():
    with faults.memory_limit(5 << 30):
        with pytest.raises(ZeroDivisionError), faults.memory_limit(4 << 30):
            raise ZeroDivisionError
        assert torch.npu.mem_get_info()[1] == 5 << 30
    assert torch.npu.mem_get_info()[1] == emulator.settings().hbm_bytes


def test_events_tell_real_time():
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    time.sleep(0.02)
    end.record()
    end.synchronize()
    assert end.query()
    assert 20 <= start.elapsed_time(end) < 2000


class Event(ctypes.Structure):
    """The emulator's own: no test waits for a second to pass."""

    _fields_ = (("recorded", ctypes.c_int), ("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def test_times_of_events_cross_seconds():
    library, elapsed, stamp = runtime.library(), ctypes.c_float(), ctypes.c_uint64()
    start, end = Event(1, 7, 900_000_000), Event(1, 9, 100_500_000)
    assert library.aclrtEventElapsedTime(ctypes.byref(elapsed), ctypes.byref(start), ctypes.byref(end)) == 0
    assert elapsed.value == 1200.5
    assert library.aclrtEventElapsedTime(ctypes.byref(elapsed), ctypes.byref(end), ctypes.byref(start)) == 0
    assert elapsed.value == -1200.5
    assert library.aclrtEventGetTimestamp(ctypes.byref(end), ctypes.byref(stamp)) == 0
    assert stamp.value == 9_100_500


@pytest.mark.parametrize("recorded", [(False, False), (True, False), (False, True)])
def test_an_event_that_was_never_recorded_has_no_time(recorded):
    start, end = (ctypes.byref(Event(here, 1, 0)) for here in recorded)
    library, elapsed, stamp = runtime.library(), ctypes.c_float(-1), ctypes.c_uint64(1)
    assert library.aclrtEventElapsedTime(ctypes.byref(elapsed), start, end) != 0
    assert elapsed.value == -1
    assert [library.aclrtEventGetTimestamp(event, ctypes.byref(stamp)) == 0 for event in (start, end)] == [*recorded]


CARD, MAX_CARDS = [20, 40], 64


def test_core_limits_of_a_thread_are_those_its_stream_has_when_it_takes_them():
    """Each kind of core and each thread has its own; what has no limit has the whole card."""
    library, value = runtime.library(), ctypes.c_uint32()
    first, second, never_limited = (ctypes.c_void_p(address) for address in (0x1230, 0x4560, 0x7890))

    def of(name, *owner):
        codes = [
            getattr(library, f"aclrtGet{name}")(*owner, kind, ctypes.byref(value)) or value.value for kind in (0, 1)
        ]
        assert getattr(library, f"aclrtGet{name}")(*owner, 2, ctypes.byref(value)) != 0
        return codes

    try:
        assert of("ResInCurrentThread") == of("StreamResLimit", first) == CARD
        assert [library.aclrtSetStreamResLimit(first, kind, 3 + kind) for kind in (0, 1, 2)][:2] == [0, 0]
        assert library.aclrtSetStreamResLimit(second, 1, 8) == 0
        assert (of("StreamResLimit", first), of("StreamResLimit", second)) == ([3, 4], [20, 8])
        assert of("ResInCurrentThread") == CARD
        assert library.aclrtUseStreamResInCurrentThread(first) == 0
        assert of("ResInCurrentThread") == [3, 4]
        with ThreadPoolExecutor(1) as other:
            assert other.submit(of, "ResInCurrentThread").result() == CARD
        assert library.aclrtResetStreamResLimit(first) == 0
        assert (of("StreamResLimit", first), of("StreamResLimit", second)) == (CARD, [20, 8])
        assert of("ResInCurrentThread") == [3, 4]
        assert library.aclrtUseStreamResInCurrentThread(first) == 0
        assert of("ResInCurrentThread") == CARD
        assert library.aclrtUseStreamResInCurrentThread(second) == 0
        assert of("ResInCurrentThread") == [20, 8]
        assert library.aclrtUseStreamResInCurrentThread(never_limited) == 0
        assert of("ResInCurrentThread") == CARD
    finally:
        library.aclrtUnuseStreamResInCurrentThread(second)
        for stream in (first, second):
            library.aclrtResetStreamResLimit(stream)
    assert of("ResInCurrentThread") == CARD


def test_core_limits_of_a_card_are_its_own():
    library, value = runtime.library(), ctypes.c_uint32()

    def of(card):
        return [library.aclrtGetDeviceResLimit(card, kind, ctypes.byref(value)) or value.value for kind in (0, 1)]

    try:
        assert [library.aclrtSetDeviceResLimit(1, kind, 5 + kind) == 0 for kind in (0, 1, 2, -1)] == [
            True,
            True,
            False,
            False,
        ]
        assert (of(0), of(1)) == (CARD, [5, 6])
    finally:
        assert library.aclrtResetDeviceResLimit(1) == 0
    assert of(1) == CARD
    for card in (-1, MAX_CARDS):
        assert library.aclrtSetDeviceResLimit(card, 0, 5) != 0
        assert library.aclrtResetDeviceResLimit(card) != 0


def test_streams_are_apart_and_in_order():
    first, second = torch.npu.Stream(), torch.npu.Stream()
    assert first != second
    with torch.npu.stream(first):
        assert torch.npu.current_stream() == first
        x = torch.ones(4, device="npu") * 3
        event = first.record_event()
    second.wait_event(event)
    with torch.npu.stream(second):
        assert (x + 1).tolist() == [4] * 4
    second.synchronize()
    torch.npu.synchronize()
    assert second.query()


def test_pinned_memory():
    x = torch.arange(6.0).pin_memory()
    assert x.is_pinned()
    there = x.to("npu", non_blocking=True)
    back = torch.empty(6).pin_memory().copy_(there, non_blocking=True)
    torch.npu.synchronize()
    assert torch.equal(back, x)
    assert not there.is_pinned()


def test_pinned_memory_is_not_the_card_s():
    before = runtime.used_bytes()
    kept = torch.empty(32 * MIB, dtype=torch.uint8).pin_memory()
    assert runtime.used_bytes() == before
    assert kept.is_pinned()


class Properties(ctypes.Structure):
    """Of memory that is to be mapped."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("handle_type", "allocation_type", "attribute")),
        *(("device", ctypes.c_uint32), ("location_type", ctypes.c_int32), ("reserved", ctypes.c_uint64)),
    )


def test_mapped_memory_is_counted_on_its_card_and_forgets_what_it_held():
    library, size = runtime.library(), ctypes.c_size_t(1 << 16)
    none, start, handle = ctypes.c_uint64(0), ctypes.c_void_p(), ctypes.c_void_p()
    before = [runtime.used_bytes(card) for card in (0, 1)]
    assert library.aclrtReserveMemAddress(ctypes.byref(start), size, none, None, none) == 0
    assert library.aclrtMallocPhysical(ctypes.byref(handle), size, ctypes.byref(Properties(device=1)), none) == 0
    assert [runtime.used_bytes(card) for card in (0, 1)] == [before[0], before[1] + size.value]
    assert library.aclrtMapMem(start, ctypes.c_size_t(size.value + 1), none, handle, none) != 0
    for _ in range(2):
        assert library.aclrtMapMem(start, size, none, handle, none) == 0
        assert ctypes.string_at(start, 4) == bytes(4)
        ctypes.memset(start, 7, size.value)
        assert library.aclrtUnmapMem(start) == 0
    assert library.aclrtFreePhysical(handle) == 0
    assert [runtime.used_bytes(card) for card in (0, 1)] == before
    assert [library.aclrtReleaseMemAddress(start) == 0 for _ in range(2)] == [True, False]


EXPANDABLE = """
import torch
x = torch.randn(600, 600, device="npu")
assert torch.equal((x + 1).cpu(), x.cpu() + 1)
reserved = torch.npu.memory_reserved()
blocks = [torch.ones(8 << 20, device="npu") for _ in range(4)]
assert torch.npu.memory_reserved() - reserved >= 100 << 20
del blocks
torch.npu.empty_cache()
assert torch.npu.memory_reserved() < 64 << 20, torch.npu.memory_reserved()
try:
    torch.empty(1 << 30, device="npu")
except torch.OutOfMemoryError:
    print("done")
"""


@pytest.mark.slow
def test_expandable_segments():
    environment = {**os.environ, "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-m", "qwen2_npu.emulator", "--hbm-gib", "1", "-c", EXPANDABLE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
