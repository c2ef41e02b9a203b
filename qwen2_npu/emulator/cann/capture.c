/* Graph capture (aclmdlRI*): who captures, on which streams, and what that forbids.
 *
 * What is captured, and its replay, lives in Python (qwen2_npu/emulator/aclgraph); the functions here call it. One
 * capture at a time. A stream belongs to it from its start, or from the moment it waits for an event of it.
 */
#include "emulator.h"

enum { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 }; /* aclmdlRICaptureMode */
enum { GREATER_OR_EQUAL = 0, EQUAL = 1, AND = 2, NOR = 3 }; /* what aclrtValueWait waits for */

/* In Python: each returns OK, or an error whose text it has set with emu_set_error. */
typedef struct {
    aclError (*begin)(int64_t model);
    aclError (*end)(int64_t model, int32_t valid);
    aclError (*execute)(int64_t model);
    aclError (*destroy)(int64_t model);
    aclError (*copy)(void *target, const void *source, size_t count);
    aclError (*fill)(void *target, int32_t value, size_t count);
    aclError (*wait)(const uint64_t *address, uint64_t value, uint32_t how);
    aclError (*write)(uint64_t *address, uint64_t value);
    aclError (*written)(void); /* outside a capture: what a replay may be waiting for */
    aclError (*settle)(void);  /* somebody waits for all work */
    int64_t (*group_begin)(void);
    int64_t (*group_end)(void);
    aclError (*update_begin)(const void *stream, int64_t group);
    aclError (*update_end)(void);
} CaptureHooks;

static CaptureHooks hooks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t next_model = 1;
static int64_t model_under_way = 0;
static int status_of_capture = NONE;
static pthread_t capturing_thread;
static __thread int32_t mode_of_thread = GLOBAL;
static int replays_wait = 0; /* a replay stands at an event that has not been recorded */

/* Streams and events of the capture under way; the first stream began it. */
typedef struct {
    void **items;
    size_t count, room;
} List;

static List streams, events;

static int holds(const List *list, const void *item) {
    for (size_t i = 0; i < list->count; i++)
        if (list->items[i] == item) return 1;
    return 0;
}

static void add(List *list, void *item) {
    if (holds(list, item)) return;
    if (list->count == list->room) {
        list->room = list->room ? 2 * list->room : 16;
        list->items = realloc(list->items, list->room * sizeof *list->items);
    }
    list->items[list->count++] = item;
}

void emu_set_capture_hooks(const CaptureHooks *given) { hooks = *given; }

/* ---- for the other files and for Python ------------------------------------------------------------------------- */

int emu_stream_status(const void *stream) {
    return model_under_way && holds(&streams, stream) ? status_of_capture : NONE;
}

void emu_invalidate_capture(void) {
    if (model_under_way) status_of_capture = INVALIDATED;
}

aclError emu_refuse_to_wait(const void *stream, const char *call) {
    int captured = stream ? emu_stream_status(stream) != NONE
                          : model_under_way && mode_of_thread != RELAXED &&
                                pthread_equal(capturing_thread, pthread_self());
    if (!captured) return replays_wait ? hooks.settle() : OK;
    emu_invalidate_capture();
    return emu_fail(ERROR_NOT_WHILE_CAPTURED,
                    "%s waits for the device while a graph is captured on the stream: nothing runs until it is "
                    "replayed", call);
}

aclError emu_refuse_event(const void *event, const char *call) {
    return emu_refuse_to_wait(model_under_way && holds(&events, event) ? streams.items[0] : "", call);
}

aclError emu_capture_copy(void *stream, void *target, const void *source, size_t count, int *handled) {
    *handled = emu_stream_status(stream) == ACTIVE;
    return *handled ? hooks.copy(target, source, count) : OK;
}

aclError emu_capture_fill(void *stream, void *target, int32_t value, size_t count, int *handled) {
    *handled = emu_stream_status(stream) == ACTIVE;
    return *handled ? hooks.fill(target, value, count) : OK;
}

int emu_capture_record(void *stream, void *event) {
    if (emu_stream_status(stream) == NONE) return 0;
    add(&events, event);
    return 1;
}

void emu_capture_wait(void *stream, void *event) {
    if (model_under_way && holds(&events, event)) add(&streams, stream);
}

void emu_set_replays_wait(int32_t waiting) { replays_wait = waiting; }

/* ---- allocations ----------------------------------------------------------------------------------------------- */

typedef struct {
    const char *start;
    size_t size;
    int32_t device; /* -1: pinned host memory */
    uint64_t serial;
} Allocation;

static Allocation *allocations;
static size_t allocation_count, allocation_room;
static uint64_t next_serial = 1;

void emu_note_allocation(const void *start, size_t size, int32_t device) {
    pthread_mutex_lock(&lock);
    if (allocation_count == allocation_room) {
        allocation_room = allocation_room ? 2 * allocation_room : 64;
        allocations = realloc(allocations, allocation_room * sizeof *allocations);
    }
    allocations[allocation_count++] = (Allocation){start, size, device, next_serial++};
    pthread_mutex_unlock(&lock);
}

void emu_forget_allocation(const void *start) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < allocation_count; i++) {
        if (allocations[i].start == start) {
            allocations[i] = allocations[--allocation_count];
            break;
        }
    }
    pthread_mutex_unlock(&lock);
}

/* Serial number of the allocation that holds ``address``, and its device; 0 where the driver did not give it out. */
uint64_t emu_find_allocation(const void *address, int32_t *device) {
    uint64_t serial = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < allocation_count; i++) {
        const Allocation *a = &allocations[i];
        if ((const char *)address >= a->start && (const char *)address < a->start + a->size) {
            serial = a->serial;
            *device = a->device;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return serial;
}

/* ---- CANN's functions -------------------------------------------------------------------------------------------- */

aclError aclmdlRICaptureBegin(void *stream, UNUSED int32_t mode) {
    if (!hooks.begin) return emu_fail(ERROR_UNSUPPORTED, "graph capture needs torch_npu imported in the emulator");
    if (model_under_way)
        return emu_fail(ERROR_STREAM_CAPTURED, "a capture is under way: the emulator captures one graph at a time");
    streams.count = events.count = 0;
    add(&streams, stream);
    capturing_thread = pthread_self();
    status_of_capture = ACTIVE;
    model_under_way = next_model++;
    aclError error = hooks.begin(model_under_way);
    if (error != OK) model_under_way = 0;
    return error;
}

aclError aclmdlRICaptureEnd(void *stream, void **model) {
    *model = NULL;
    if (!model_under_way) return emu_fail(ERROR_NOT_CAPTURED, "no graph is captured on this stream");
    if (stream != streams.items[0]) return emu_fail(ERROR_UNMATCHED, "the capture began on another stream");
    int valid = status_of_capture == ACTIVE;
    int64_t ended = model_under_way;
    model_under_way = 0;
    aclError error = hooks.end(ended, valid);
    if (error != OK) return error;
    if (!valid) return emu_fail(ERROR_INVALIDATED, "the capture was ended by an error before this call");
    *model = (void *)(intptr_t)ended;
    return OK;
}

aclError aclmdlRICaptureGetInfo(void *stream, int32_t *status, void **model) {
    int found = emu_stream_status(stream);
    if (status) *status = found;
    if (model) *model = found == NONE ? NULL : (void *)(intptr_t)model_under_way;
    return OK;
}

aclError aclmdlRICaptureThreadExchangeMode(int32_t *mode) {
    int32_t before = mode_of_thread;
    mode_of_thread = *mode;
    *mode = before;
    return OK;
}

aclError aclmdlRIGetId(void *model, uint32_t *id) { *id = (uint32_t)(intptr_t)model; return OK; }

aclError aclmdlRIExecuteAsync(void *model, void *stream) {
    if (emu_stream_status(stream) != NONE) {
        emu_invalidate_capture();
        return emu_fail(ERROR_UNSUPPORTED, "the emulator replays no graph while it captures another");
    }
    return hooks.execute((int64_t)(intptr_t)model);
}

aclError aclmdlRIDestroy(void *model) { return hooks.destroy ? hooks.destroy((int64_t)(intptr_t)model) : OK; }

aclError aclmdlRICaptureTaskGrpBegin(void *stream) {
    if (emu_stream_status(stream) != ACTIVE) return emu_fail(ERROR_NOT_CAPTURED, "a task group outside a capture");
    return hooks.group_begin() ? OK : emu_fail(ERROR_INVALID_PARAM, "a task group inside another");
}

aclError aclmdlRICaptureTaskGrpEnd(void *stream, void **handle) {
    if (emu_stream_status(stream) != ACTIVE) return emu_fail(ERROR_NOT_CAPTURED, "a task group outside a capture");
    int64_t group = hooks.group_end();
    *handle = (void *)(intptr_t)group;
    return group ? OK : emu_fail(ERROR_INVALID_PARAM, "the end of a task group that was not begun");
}

aclError aclmdlRICaptureTaskUpdateBegin(void *stream, void *handle) {
    return hooks.update_begin ? hooks.update_begin(stream, (int64_t)(intptr_t)handle) : ERROR_UNSUPPORTED;
}

aclError aclmdlRICaptureTaskUpdateEnd(UNUSED void *stream) {
    return hooks.update_end ? hooks.update_end() : ERROR_UNSUPPORTED;
}

/* Values in memory that one stream writes and another waits for: torch_npu's events between a graph and others. */

int emu_value_is_there(const uint64_t *address, uint64_t value, uint32_t how) {
    switch (how) {
        case GREATER_OR_EQUAL: return *address >= value;
        case EQUAL: return *address == value;
        case AND: return (*address & value) != 0;
        case NOR: return ~(*address | value) != 0;
        default: return 0;
    }
}

aclError aclrtValueWrite(void *address, uint64_t value, UNUSED uint32_t flag, void *stream) {
    if (emu_stream_status(stream) == ACTIVE) return hooks.write(address, value);
    *(uint64_t *)address = value;
    return replays_wait ? hooks.written() : OK;
}

aclError aclrtValueWait(void *address, uint64_t value, uint32_t how, void *stream) {
    if (emu_stream_status(stream) == ACTIVE) return hooks.wait(address, value, how);
    if (emu_value_is_there(address, value, how)) return OK;
    return emu_fail(ERROR_UNSUPPORTED, "a stream waits for an external event that is recorded later: the emulator runs "
                                       "work when it is given");
}

/* Whether the operators of a captured stream keep their shapes, for profiling: nothing to do here. */
aclError aclrtSetStreamAttribute(UNUSED void *stream, UNUSED int32_t attribute, UNUSED void *value) { return OK; }
