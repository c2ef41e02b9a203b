/* The part of CANN's runtime that torch_npu calls, on host memory.
 *
 * Device memory is host memory; every call completes before it returns, so a stream is always idle and an event is
 * complete once recorded. What is kept for real: the device of each allocation and the bytes used per device (an
 * allocation beyond the card's size fails as the driver's would), event times. Graph capture is in capture.c.
 *
 * Signatures follow CANN's acl_rt.h. Functions whose names start with emu_ are this project's own controls.
 */
#include "emulator.h"

#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char soc_name[64] = "Ascend910B4";
static char cann_version[64] = "8.5.0";
static uint32_t device_count = 8;
static uint64_t hbm_bytes = 0;
static uint64_t used_bytes[MAX_DEVICES];
static uint64_t peak_bytes[MAX_DEVICES];
static uint64_t allocations = 0;
static int64_t allocation_to_fail = 0; /* counts down to 1; from then on every allocation fails; 0: none does */
static __thread int32_t current_device = -1;
static __thread char last_error[1024] = "";

aclError emu_fail(aclError code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return code;
}

/* For Python: the text that torch_npu adds to the error of the call that fails. */
void emu_set_error(const char *text) { emu_fail(OK, "%s", text); }

/* ---- controls ------------------------------------------------------------------------------------------------- */

void emu_configure(const char *soc, const char *cann, uint32_t devices, uint64_t bytes) {
    snprintf(soc_name, sizeof soc_name, "%s", soc);
    snprintf(cann_version, sizeof cann_version, "%s", cann);
    device_count = devices < MAX_DEVICES ? devices : MAX_DEVICES;
    hbm_bytes = bytes;
}

void emu_set_hbm_bytes(uint64_t bytes) { hbm_bytes = bytes; }
uint64_t emu_used_bytes(uint32_t device) { return device < MAX_DEVICES ? used_bytes[device] : 0; }
uint64_t emu_peak_bytes(uint32_t device) { return device < MAX_DEVICES ? peak_bytes[device] : 0; }
uint64_t emu_allocations(void) { return allocations; }
void emu_fail_allocation(int64_t nth) { allocation_to_fail = nth; }

/* ---- life cycle, devices, contexts ---------------------------------------------------------------------------- */

aclError aclInit(UNUSED const char *config) { return OK; }
aclError aclFinalize(void) { return OK; }
const char *aclGetRecentErrMsg(void) { return last_error; }
const char *aclrtGetSocName(void) { return soc_name; }

aclError aclrtGetDeviceCount(uint32_t *count) { *count = device_count; return OK; }

static char contexts[MAX_DEVICES]; /* the address is the handle */

aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || (uint32_t)device >= device_count)
        return emu_fail(ERROR_INVALID_DEVICE, "device %d does not exist: the emulated host has %u", device,
                        device_count);
    current_device = device;
    return OK;
}

aclError aclrtGetDevice(int32_t *device) {
    if (current_device < 0) return emu_fail(ERROR_CONTEXT_NULL, "no device is set in this thread");
    *device = current_device;
    return OK;
}

aclError aclrtResetDevice(UNUSED int32_t device) { return OK; }

aclError aclrtGetCurrentContext(void **context) {
    *context = current_device < 0 ? NULL : &contexts[current_device];
    return current_device < 0 ? emu_fail(ERROR_CONTEXT_NULL, "no context in this thread") : OK;
}

aclError aclrtSetCurrentContext(void *context) {
    char *handle = context;
    if (handle < contexts || handle >= contexts + MAX_DEVICES) return emu_fail(ERROR_INVALID_PARAM, "not a context");
    current_device = (int32_t)(handle - contexts);
    return OK;
}

aclError aclrtCreateContext(void **context, int32_t device) {
    aclError error = aclrtSetDevice(device);
    if (error == OK) *context = &contexts[device];
    return error;
}

aclError aclrtDestroyContext(UNUSED void *context) { return OK; }

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    *active = used_bytes[device] > 0 || current_device == device;
    return OK;
}

aclError aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logical) { *logical = user; return OK; }
aclError aclrtDeviceGetBareTgid(int32_t *pid) { *pid = (int32_t)getpid(); return OK; }

aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = device != peer; return OK; }
aclError aclrtDeviceEnablePeerAccess(UNUSED int32_t peer, UNUSED uint32_t flags) { return OK; }

/* Attributes of an Atlas 800I A2 card; what a caller cannot be told is refused. */
aclError aclrtGetDeviceInfo(UNUSED uint32_t device, int32_t attribute, int64_t *value) {
    switch (attribute) {
        case 1: *value = 6; return OK;    /* AI CPUs */
        case 101: case 102: *value = 20; return OK; /* AI cores, cube cores */
        case 201: *value = 40; return OK; /* vector cores */
        case 301: *value = (int64_t)hbm_bytes; return OK;
        case 302: *value = 96 << 20; return OK; /* L2 cache */
        case 501: *value = 0; return OK;
        default: return emu_fail(ERROR_UNSUPPORTED, "device attribute %d is not emulated", attribute);
    }
}

aclError aclGetDeviceCapability(UNUSED uint32_t device, int32_t info, int64_t *value) {
    switch (info) {
        case 0: *value = 20; return OK; /* AI cores */
        case 1: *value = 40; return OK; /* vector cores */
        case 2: *value = 96 << 20; return OK;
        default: return emu_fail(ERROR_UNSUPPORTED, "device capability %d is not emulated", info);
    }
}

/* ---- memory --------------------------------------------------------------------------------------------------- */

enum { HEADER = 512, MAGIC = 0x4e505545 };

typedef struct {
    uint32_t magic;
    int32_t device; /* -1: pinned host memory */
    uint64_t size;
} Header;

static Header *header_of(const void *pointer) { return (Header *)((char *)pointer - HEADER); }

aclError emu_take_memory(int32_t device, size_t size) {
    if (device < 0) return OK;
    pthread_mutex_lock(&lock);
    int injected = allocation_to_fail == 1;
    if (allocation_to_fail > 1) allocation_to_fail--;
    int full = used_bytes[device] + size > hbm_bytes;
    if (!injected && !full) {
        used_bytes[device] += size;
        if (used_bytes[device] > peak_bytes[device]) peak_bytes[device] = used_bytes[device];
        allocations++;
    }
    pthread_mutex_unlock(&lock);
    if (injected) return emu_fail(ERROR_MEMORY, "allocation of %zu bytes failed by injection", size);
    if (full)
        return emu_fail(ERROR_MEMORY, "allocation of %zu bytes: %llu of %llu bytes of emulated device %d are used",
                        size, (unsigned long long)used_bytes[device], (unsigned long long)hbm_bytes, device);
    return OK;
}

void emu_give_memory(int32_t device, size_t size) {
    if (device < 0) return;
    pthread_mutex_lock(&lock);
    used_bytes[device] -= size;
    pthread_mutex_unlock(&lock);
}

/* mmap: pages a caller never touches cost nothing, so a caching allocator's large blocks are cheap. */
static aclError allocate(void **pointer, size_t size, int32_t device) {
    if (size == 0) return emu_fail(ERROR_INVALID_PARAM, "allocation of zero bytes");
    aclError error = emu_take_memory(device, size);
    if (error != OK) return error;
    char *base = mmap(NULL, size + HEADER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        emu_give_memory(device, size);
        return emu_fail(ERROR_MEMORY, "the host has no %zu bytes left for emulated device memory", size);
    }
    *(Header *)base = (Header){MAGIC, device, size};
    *pointer = base + HEADER;
    emu_note_allocation(*pointer, size, device);
    return OK;
}

static aclError release(void *pointer) {
    Header *header = header_of(pointer);
    if (header->magic != MAGIC) return emu_fail(ERROR_INVALID_PARAM, "%p was not allocated here", pointer);
    emu_give_memory(header->device, header->size);
    emu_forget_allocation(pointer);
    header->magic = 0;
    munmap(header, header->size + HEADER);
    return OK;
}

aclError aclrtMalloc(void **pointer, size_t size, UNUSED int32_t policy) {
    int32_t device;
    aclError error = aclrtGetDevice(&device);
    return error == OK ? allocate(pointer, size, device) : error;
}

aclError aclrtMallocAlign32(void **pointer, size_t size, int32_t policy) { return aclrtMalloc(pointer, size, policy); }
aclError aclrtFree(void *pointer) { return release(pointer); }
aclError aclrtMallocHost(void **pointer, size_t size) { return allocate(pointer, size, -1); }
aclError aclrtMallocHostWithCfg(void **pointer, uint64_t size, UNUSED void *config) {
    return allocate(pointer, size, -1);
}
aclError aclrtFreeHost(void *pointer) { return release(pointer); }

aclError aclrtGetMemInfo(UNUSED int32_t attribute, size_t *free_bytes, size_t *total) {
    int32_t device = current_device < 0 ? 0 : current_device;
    *total = hbm_bytes;
    *free_bytes = hbm_bytes > used_bytes[device] ? hbm_bytes - used_bytes[device] : 0; /* the limit may be a new one */
    return OK;
}

static aclError copy(void *target, size_t room, const void *source, size_t count) {
    if (count > room) return emu_fail(ERROR_INVALID_PARAM, "copy of %zu bytes into %zu", count, room);
    memmove(target, source, count);
    return OK;
}

static aclError fill(void *target, size_t room, int32_t value, size_t count) {
    if (count > room) return emu_fail(ERROR_INVALID_PARAM, "memset of %zu bytes into %zu", count, room);
    memset(target, value, count);
    return OK;
}

aclError aclrtMemcpy(void *target, size_t room, const void *source, size_t count, UNUSED int32_t kind) {
    aclError error = emu_refuse_to_wait(NULL, "aclrtMemcpy");
    return error == OK ? copy(target, room, source, count) : error;
}

aclError aclrtMemcpyAsync(void *target, size_t room, const void *source, size_t count, UNUSED int32_t kind,
                          void *stream) {
    int captured;
    aclError error = emu_capture_copy(stream, target, source, count, &captured);
    return captured ? error : copy(target, room, source, count);
}

aclError aclrtMemset(void *target, size_t room, int32_t value, size_t count) {
    aclError error = emu_refuse_to_wait(NULL, "aclrtMemset");
    return error == OK ? fill(target, room, value, count) : error;
}

aclError aclrtMemsetAsync(void *target, size_t room, int32_t value, size_t count, void *stream) {
    int captured;
    aclError error = emu_capture_fill(stream, target, value, count, &captured);
    return captured ? error : fill(target, room, value, count);
}

/* ---- streams and events --------------------------------------------------------------------------------------- */

typedef struct {
    int32_t id;
    int32_t device;
} Stream;

typedef struct {
    int recorded;
    struct timespec time;
} Event;

static int32_t next_stream = 1;

aclError aclrtCreateStreamWithConfig(void **stream, UNUSED uint32_t priority, UNUSED uint32_t flag) {
    Stream *made = malloc(sizeof *made);
    *made = (Stream){__sync_fetch_and_add(&next_stream, 1), current_device};
    *stream = made;
    return OK;
}

aclError aclrtCreateStream(void **stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }
aclError aclrtDestroyStream(void *stream) { free(stream); return OK; }
aclError aclrtDestroyStreamForce(void *stream) { free(stream); return OK; }
aclError aclrtSynchronizeStream(void *stream) { return emu_refuse_to_wait(stream, "aclrtSynchronizeStream"); }
aclError aclrtSynchronizeStreamWithTimeout(void *stream, UNUSED int32_t timeout) {
    return aclrtSynchronizeStream(stream);
}
aclError aclrtSynchronizeDevice(void) { return emu_refuse_to_wait(NULL, "aclrtSynchronizeDevice"); }
aclError aclrtSynchronizeDeviceWithTimeout(UNUSED int32_t timeout) { return aclrtSynchronizeDevice(); }
aclError aclrtStreamQuery(void *stream, int32_t *status) {
    *status = 0;
    return emu_refuse_to_wait(stream, "aclrtStreamQuery");
}
aclError aclrtStreamGetId(void *stream, int32_t *id) { *id = stream ? ((Stream *)stream)->id : 0; return OK; }
aclError aclrtSetStreamFailureMode(UNUSED void *stream, UNUSED uint64_t mode) { return OK; }

aclError aclrtCreateEventExWithFlag(void **event, UNUSED uint32_t flag) {
    *event = calloc(1, sizeof(Event));
    return OK;
}

aclError aclrtCreateEventWithFlag(void **event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
aclError aclrtCreateEvent(void **event) { return aclrtCreateEventExWithFlag(event, 0); }
aclError aclrtDestroyEvent(void *event) { free(event); return OK; }

aclError aclrtRecordEvent(void *handle, void *stream) {
    if (emu_capture_record(stream, handle)) return OK;
    Event *event = handle;
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    event->recorded = 1;
    return OK;
}

aclError aclrtResetEvent(void *event, UNUSED void *stream) { ((Event *)event)->recorded = 0; return OK; }
aclError aclrtStreamWaitEvent(void *stream, void *event) { emu_capture_wait(stream, event); return OK; }
aclError aclrtSynchronizeEvent(void *event) { return emu_refuse_event(event, "aclrtSynchronizeEvent"); }
aclError aclrtQueryEventStatus(void *event, int32_t *status) {
    *status = ((Event *)event)->recorded;
    return emu_refuse_event(event, "aclrtQueryEventStatus");
}
aclError aclrtQueryEventWaitStatus(UNUSED void *event, int32_t *status) { *status = 0; return OK; }
aclError aclQueryEventRecordedStatus(void *event, int32_t *status) { return aclrtQueryEventStatus(event, status); }
aclError aclQueryEventWaitStatus(void *event, int32_t *status) { return aclrtQueryEventWaitStatus(event, status); }

aclError aclrtEventGetTimestamp(void *handle, uint64_t *microseconds) {
    Event *event = handle;
    if (!event->recorded) return emu_fail(ERROR_NO_EVENT, "the event was never recorded");
    *microseconds = (uint64_t)event->time.tv_sec * 1000000u + (uint64_t)event->time.tv_nsec / 1000u;
    return OK;
}

aclError aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    Event *first = start, *last = end;
    if (!first->recorded || !last->recorded) return emu_fail(ERROR_NO_EVENT, "both events must be recorded first");
    *milliseconds = (float)((double)(last->time.tv_sec - first->time.tv_sec) * 1e3 +
                            (double)(last->time.tv_nsec - first->time.tv_nsec) * 1e-6);
    return OK;
}

/* Work on a stream runs when it is given: a host function, too. */
aclError aclrtLaunchHostFunc(void *stream, void (*function)(void *), void *arguments) {
    if (emu_stream_status(stream)) {
        emu_invalidate_capture();
        return emu_fail(ERROR_UNSUPPORTED, "host functions in captured graphs are not emulated");
    }
    function(arguments);
    return OK;
}
aclError aclrtLaunchCallback(void (*function)(void *), void *arguments, UNUSED int32_t block, void *stream) {
    return aclrtLaunchHostFunc(stream, function, arguments);
}
aclError aclrtSubscribeReport(UNUSED uint64_t thread, UNUSED void *stream) { return OK; }
aclError aclrtUnSubscribeReport(UNUSED uint64_t thread, UNUSED void *stream) { return OK; }
aclError aclrtProcessReport(UNUSED int32_t timeout) { return OK; }

/* ---- options, versions, logs ---------------------------------------------------------------------------------- */

size_t aclGetCompileoptSize(UNUSED int32_t option) { return 64; }
aclError aclGetCompileopt(UNUSED int32_t option, char *value, size_t length) {
    if (length) value[0] = 0;
    return OK;
}
aclError aclSetCompileopt(UNUSED int32_t option, UNUSED const char *value) { return OK; }
aclError aclrtGetSysParamOpt(UNUSED int32_t option, int64_t *value) { *value = 0; return OK; }
aclError aclrtSetSysParamOpt(UNUSED int32_t option, UNUSED int64_t value) { return OK; }
aclError aclrtCtxSetSysParamOpt(UNUSED int32_t option, UNUSED int64_t value) { return OK; }
aclError aclrtSetDeviceSatMode(UNUSED int32_t mode) { return OK; }
aclError aclrtSetOpWaitTimeout(UNUSED uint32_t timeout) { return OK; }
aclError aclrtSetOpExecuteTimeOut(UNUSED uint32_t timeout) { return OK; }
aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t *actual) { *actual = timeout; return OK; }
aclError aclrtPeekAtLastError(UNUSED int32_t level) { return OK; }
aclError aclrtGetLastError(UNUSED int32_t level) { return OK; }

aclError aclsysGetVersionStr(UNUSED char *package, char *version) {
    strcpy(version, cann_version);
    return OK;
}

typedef struct {
    char version[128];
    char parts[4][64];
    char reserved[128];
} PackageVersion;

aclError aclsysGetCANNVersion(UNUSED int32_t package, PackageVersion *version) {
    memset(version, 0, sizeof *version);
    snprintf(version->version, sizeof version->version, "%s", cann_version);
    sscanf(cann_version, "%63[^.].%63[^.].%63s", version->parts[0], version->parts[1], version->parts[2]);
    return OK;
}

void aclAppLog(UNUSED int32_t level, UNUSED const char *function, UNUSED const char *file, UNUSED uint32_t line,
               UNUSED const char *format, ...) {}

/* ---- the secure C functions CANN brings along ------------------------------------------------------------------- */

int vsnprintf_s(char *target, size_t room, size_t count, const char *format, va_list arguments) {
    size_t limit = count + 1 < room ? count + 1 : room;
    return vsnprintf(target, limit, format, arguments);
}

int snprintf_s(char *target, size_t room, size_t count, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int written = vsnprintf_s(target, room, count, format, arguments);
    va_end(arguments);
    return written;
}

int strcpy_s(char *target, size_t room, const char *source) {
    if (strlen(source) >= room) return 34; /* ERANGE */
    strcpy(target, source);
    return 0;
}

/* Every other name the wheel needs is a weak function that leads to one of these two. With QWEN2_NPU_EMULATOR_TRACE
 * set, calls are printed. */

static void trace(const char *name) {
    if (getenv("QWEN2_NPU_EMULATOR_TRACE")) fprintf(stderr, "emulator: %s is not implemented\n", name);
}

long emu_nothing(const char *name) {
    trace(name);
    return OK;
}

long emu_refuse(const char *name) {
    trace(name);
    return emu_fail(ERROR_UNSUPPORTED, "%s is not emulated", name);
}
