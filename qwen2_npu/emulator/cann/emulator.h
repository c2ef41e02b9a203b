/* What the files of this folder share. Names that start with emu_ are this project's own; all others are CANN's. */
#pragma once

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define UNUSED __attribute__((unused)) /* before a parameter that CANN's signature has and the emulator ignores */

typedef int aclError;

enum {
    OK = 0,
    ERROR_INVALID_PARAM = 107000,  /* ACL_ERROR_RT_PARAM_INVALID */
    ERROR_INVALID_DEVICE = 107001, /* ACL_ERROR_RT_INVALID_DEVICEID */
    ERROR_CONTEXT_NULL = 107002,
    ERROR_NO_EVENT = 107005,
    ERROR_STREAM_CAPTURED = 107027,
    ERROR_NOT_CAPTURED = 107029,
    ERROR_NOT_WHILE_CAPTURED = 107030,
    ERROR_UNMATCHED = 107036,
    ERROR_UNSUPPORTED = 207000,
    ERROR_MEMORY = 207001, /* ACL_ERROR_RT_MEMORY_ALLOCATION: torch_npu turns it into its out-of-memory error */
    ERROR_EXECUTE = 500002,
    ERROR_INVALIDATED = 507903,
};

enum { MAX_DEVICES = 64 };

/* ---- runtime.c ------------------------------------------------------------------------------------------------- */

/* Returns ``code``; torch_npu adds the text to the error that it raises. */
aclError emu_fail(aclError code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Count memory against a card, whose size is enforced. Pinned host memory (device -1) is not counted. */
aclError emu_take_memory(int32_t device, size_t size);
void emu_give_memory(int32_t device, size_t size);

/* ---- capture.c: work on a captured stream is recorded, waiting for it is an error ------------------------------ */

enum { NONE = 0, ACTIVE = 1, INVALIDATED = 2 }; /* aclmdlRICaptureStatus */

/* Whether ``stream`` is captured: NONE, ACTIVE or INVALIDATED. */
int emu_stream_status(const void *stream);
void emu_invalidate_capture(void);

/* A call that must wait for ``stream`` (NULL: for whatever this thread captures) ends the capture. */
aclError emu_refuse_to_wait(const void *stream, const char *call);
aclError emu_refuse_event(const void *event, const char *call);

/* ``handled``, or the result: whether the call belongs to a capture, and is done. */
aclError emu_capture_copy(void *stream, void *target, const void *source, size_t count, int *handled);
aclError emu_capture_fill(void *stream, void *target, int32_t value, size_t count, int *handled);
int emu_capture_record(void *stream, void *event);

/* A stream that waits for an event of the capture joins it, or comes back to it. */
void emu_capture_wait(void *stream, void *event);

/* Allocations: a replay uses addresses, and must not use what has been given back. */
void emu_note_allocation(const void *start, size_t size, int32_t device);
void emu_forget_allocation(const void *start);
