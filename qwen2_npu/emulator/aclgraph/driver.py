"""Connects captures and replays with the driver's functions, in ``cann/capture.c``."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qwen2_npu.emulator import runtime
from qwen2_npu.emulator.aclgraph.capture import (
    HOST,
    Capture,
    CaptureError,
    Journal,
    at_fixed_addresses,
    extent,
    written_by,
)
from qwen2_npu.emulator.aclgraph.captured import Computation, Graph, Group, Wait, Write
from qwen2_npu.emulator.collectives import library as collectives
from qwen2_npu.emulator.eager import random, tap
from qwen2_npu.emulator.eager.plan import Plan

OK, FAILED = 0, 500002

_int64, _pointer, _size = ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "begin": (ctypes.c_int, _int64),
    "end": (ctypes.c_int, _int64, ctypes.c_int32),
    "execute": (ctypes.c_int, _int64),
    "destroy": (ctypes.c_int, _int64),
    "copy": (ctypes.c_int, _pointer, _pointer, _size),
    "fill": (ctypes.c_int, _pointer, ctypes.c_int32, _size),
    "wait": (ctypes.c_int, _pointer, ctypes.c_uint64, ctypes.c_uint32),
    "write": (ctypes.c_int, _pointer, ctypes.c_uint64),
    "written": (ctypes.c_int,),
    "settle": (ctypes.c_int,),
    "group_begin": (_int64,),
    "group_end": (_int64,),
    "update_begin": (ctypes.c_int, _pointer, _int64),
    "update_end": (ctypes.c_int,),
}
"""C's struct CaptureHooks, field by field: result and arguments."""


class ReplayError(RuntimeError):
    """A captured graph cannot be replayed."""


class Driver:
    """Captures and captured graphs of this process, and the functions C calls."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._capture: Capture | None = None
        self._graphs: dict[int, Graph] = {}
        self._groups: dict[int, Group] = {}
        self._handles = itertools.count(1)  # never one that a group of another graph still has
        self._updating: tuple[Group, Group] | None = None  # what is updated, and what it becomes
        self._updating_on: int | None = None  # the stream whose operators are the update
        self._waiting: dict[int, Iterator[Wait]] = {}
        library.emu_find_allocation.argtypes = (_pointer, ctypes.POINTER(ctypes.c_int32))
        library.emu_find_allocation.restype = ctypes.c_uint64
        library.emu_stream_status.argtypes = (_pointer,)
        library.emu_value_is_there.argtypes = (_pointer, ctypes.c_uint64, ctypes.c_uint32)
        library.emu_set_error.argtypes = (ctypes.c_char_p,)

    def install(self) -> None:
        fields = [(name, ctypes.CFUNCTYPE(*signature)) for name, signature in _SIGNATURES.items()]
        hooks_type = type("CaptureHooks", (ctypes.Structure,), {"_fields_": fields})
        self._hooks = hooks_type(*(kind(self._reporting(getattr(self, f"_{name}"))) for name, kind in fields))
        self._library.emu_set_capture_hooks(ctypes.byref(self._hooks))

    def _reporting(self, function: Callable[..., int | None]) -> Callable[..., int]:
        """An exception becomes an error of the driver, with its text; it cannot pass through C."""

        def call(*arguments: Any) -> int:
            try:
                return function(*arguments) or OK
            except Exception as error:
                self._library.emu_invalidate_capture()
                self._library.emu_set_error(f"{type(error).__name__}: {error}".encode())
                return FAILED

        return call

    # ---- capture -------------------------------------------------------------------------------------------------
    def _begin(self, model: int) -> None:
        self._capture = Capture(self, _default_generator)
        self._listen()
        collectives.recorder = self._capture.later

    def _end(self, model: int, valid: int) -> None:
        capture, self._capture = self._capture, None
        self._listen()
        collectives.recorder = None
        if capture is not None:
            graph = capture.end()
            if valid:
                self._graphs[model] = graph

    def _copy(self, target: int, source: int, count: int) -> None:
        self._under_way().copy(target, source, count)

    def _fill(self, target: int, value: int, count: int) -> None:
        self._under_way().fill(target, value, count)

    def _wait(self, address: int, value: int, how: int) -> None:
        self._under_way().wait(Wait(address, value, how))

    def _write(self, address: int, value: int) -> None:
        self._under_way().write(Write(address, value))

    def _group_begin(self) -> int:
        return int(self._under_way().begin_group())

    def _group_end(self) -> int:
        group = self._under_way().end_group()
        if group is None:
            return 0
        handle = next(self._handles)
        self._groups[handle] = group
        return handle

    def _under_way(self) -> Capture:
        if self._capture is None:
            raise RuntimeError("no capture is under way")
        return self._capture

    def _listen(self) -> None:
        """Be told of operators while something is captured, updated or waiting, and only then."""
        wanted = self._capture is not None or self._updating is not None or bool(self._waiting)
        listening = self._operator in tap.listeners
        if wanted and not listening:
            tap.listeners.append(self._operator)
            tap.stored.append(self._stored)
            tap.leaving.append(self._leaving)
        elif listening and not wanted:
            tap.listeners.remove(self._operator)
            tap.stored.remove(self._stored)
            tap.leaving.remove(self._leaving)

    def _operator(self, plan: Plan, run: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        if self._updating is not None and _current_stream() == self._updating_on:
            return self._replace(plan, run, args, kwargs)
        if self._capture is not None and self._on_captured_stream():
            try:
                return self._capture.operator(plan, run, args, kwargs)
            except Exception:
                self._library.emu_invalidate_capture()
                raise
        if self._waiting:
            self._settle()
        return run(*args, **kwargs)

    def _stored(self, result: torch.Tensor, out: torch.Tensor) -> None:
        if self._capture is not None and self._on_captured_stream():
            self._capture.stored(result, out)

    def _leaving(self, plan: Plan) -> None:
        if self._capture is not None and self._on_captured_stream():
            self._library.emu_invalidate_capture()
            raise CaptureError(f"{plan.op} to the host, while a graph is captured: the copy would wait for the stream")

    def _on_captured_stream(self) -> bool:
        return bool(self._library.emu_stream_status(_current_stream()))

    # ---- update --------------------------------------------------------------------------------------------------
    def _update_begin(self, stream: int | None, handle: int) -> None:
        if handle not in self._groups:
            raise ReplayError(f"there is no task group {handle}")
        self._updating, self._updating_on = (self._groups[handle], Group()), stream or 0
        self._listen()

    def _update_end(self) -> None:
        if self._updating is None:
            raise ReplayError("the end of an update that was not begun")
        group, new = self._updating
        self._updating = None
        self._listen()
        group.actions, group.allocations = new.actions, new.allocations

    def _replace(self, plan: Plan, run: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Record what the next replay does, and leave memory as it is: the replay may be half-way.

        An update that fails is over: torch_npu ends only those that do not.
        """
        assert self._updating is not None
        new = self._updating[1]
        journal = Journal()
        try:
            args, kwargs = at_fixed_addresses(plan, (args, kwargs), self, new.allocations)
            new.actions.append(Computation(run, args, kwargs))
            for target in written_by(plan, args, kwargs):
                journal.save(*extent(target))
            return run(*args, **kwargs)
        except Exception:
            self._updating = None
            self._listen()
            raise
        finally:
            journal.undo()

    # ---- replay --------------------------------------------------------------------------------------------------
    def _execute(self, model: int) -> None:
        if self._waiting:
            self._settle()
        graph = self._graphs.get(model)
        if graph is None:
            raise ReplayError(f"there is no captured graph {model}")
        for serial, address in graph.used():
            if self.allocation(address)[0] != serial:
                raise ReplayError(
                    f"the graph uses memory at {address:#x} that has been given back to the driver since it was "
                    "captured: keep the tensors it was captured with, and its memory pool"
                )
        self._go_on(model, graph.replay(self._is_there))

    def _go_on(self, model: int, replay: Iterator[Wait]) -> None:
        with torch.no_grad():
            waits = next(replay, None) is not None
        if waits:
            self._waiting[model] = replay
        else:
            self._waiting.pop(model, None)
        self._library.emu_set_replays_wait(bool(self._waiting))
        self._listen()

    def _is_there(self, wait: Wait) -> bool:
        return bool(self._library.emu_value_is_there(wait.address, wait.value, wait.how))

    def _written(self) -> None:
        """A value was written; replays that waited for it go on."""
        for model, replay in list(self._waiting.items()):
            self._go_on(model, replay)

    def _settle(self) -> None:
        if self._waiting and self._updating is None:
            raise ReplayError(
                "a replay waits for the update of its task groups, and this call would wait for the replay forever: "
                "update the graph first"
            )

    def _destroy(self, model: int) -> None:
        graph = self._graphs.pop(model, None)
        self._waiting.pop(model, None)
        self._library.emu_set_replays_wait(bool(self._waiting))
        self._listen()
        if graph is not None:
            gone = {id(action) for action in graph.actions}
            self._groups = {handle: group for handle, group in self._groups.items() if id(group) not in gone}

    # ---- memory, as the other files see it -----------------------------------------------------------------------
    def allocation(self, address: int) -> tuple[int, int]:
        device = ctypes.c_int32(HOST)
        serial = self._library.emu_find_allocation(address, ctypes.byref(device))
        return int(serial), device.value


def _current_stream() -> int:
    return int(torch.npu.current_stream().npu_stream)  # type: ignore[attr-defined]


def _default_generator() -> torch.Generator:
    return random.draw(random.default_generator(torch.npu.current_device()))  # type: ignore[attr-defined]


_driver: Driver | None = None


def install() -> None:
    """Once per process."""
    global _driver
    if _driver is None:
        _driver = Driver(runtime.library())
        _driver.install()
