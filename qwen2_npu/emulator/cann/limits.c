/* How many cores work may use: per device, per stream, per thread. Kept and given back; nothing is slower for it. */
#include "emulator.h"

enum { KINDS = 2 }; /* cube cores, vector cores */

static const uint32_t whole_card[KINDS] = {20, 40};

typedef struct {
    uint32_t value[KINDS]; /* 0: no limit of its own */
} Limits;

typedef struct {
    const void *stream;
    Limits limits;
} StreamLimits;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Limits devices[MAX_DEVICES];
static StreamLimits *streams;
static size_t stream_count;
static __thread Limits in_thread;

static aclError refused(void) {
    return emu_fail(ERROR_INVALID_PARAM, "no such device, or no such kind of core");
}

static int valid(int32_t device, int32_t kind) {
    return device >= 0 && device < MAX_DEVICES && kind >= 0 && kind < KINDS;
}

aclError aclrtGetDeviceResLimit(int32_t device, int32_t kind, uint32_t *value) {
    if (!valid(device, kind)) return refused();
    *value = devices[device].value[kind] ? devices[device].value[kind] : whole_card[kind];
    return OK;
}

aclError aclrtSetDeviceResLimit(int32_t device, int32_t kind, uint32_t value) {
    if (!valid(device, kind)) return refused();
    devices[device].value[kind] = value;
    return OK;
}

aclError aclrtResetDeviceResLimit(int32_t device) {
    if (!valid(device, 0)) return refused();
    devices[device] = (Limits){{0, 0}};
    return OK;
}

/* The stream's entry; NULL where it has none and none is to be made. */
static Limits *of_stream(const void *stream, int make) {
    for (size_t i = 0; i < stream_count; i++)
        if (streams[i].stream == stream) return &streams[i].limits;
    if (!make) return NULL;
    streams = realloc(streams, (stream_count + 1) * sizeof *streams);
    streams[stream_count] = (StreamLimits){stream, {{0, 0}}};
    return &streams[stream_count++].limits;
}

aclError aclrtGetStreamResLimit(const void *stream, int32_t kind, uint32_t *value) {
    if (!valid(0, kind)) return refused();
    pthread_mutex_lock(&lock);
    const Limits *found = of_stream(stream, 0);
    *value = found && found->value[kind] ? found->value[kind] : whole_card[kind];
    pthread_mutex_unlock(&lock);
    return OK;
}

aclError aclrtSetStreamResLimit(const void *stream, int32_t kind, uint32_t value) {
    if (!valid(0, kind)) return refused();
    pthread_mutex_lock(&lock);
    of_stream(stream, 1)->value[kind] = value;
    pthread_mutex_unlock(&lock);
    return OK;
}

aclError aclrtResetStreamResLimit(const void *stream) {
    pthread_mutex_lock(&lock);
    Limits *found = of_stream(stream, 0);
    if (found) *found = (Limits){{0, 0}};
    pthread_mutex_unlock(&lock);
    return OK;
}

aclError aclrtUseStreamResInCurrentThread(const void *stream) {
    pthread_mutex_lock(&lock);
    const Limits *found = of_stream(stream, 0);
    in_thread = found ? *found : (Limits){{0, 0}};
    pthread_mutex_unlock(&lock);
    return OK;
}

aclError aclrtUnuseStreamResInCurrentThread(UNUSED const void *stream) {
    in_thread = (Limits){{0, 0}};
    return OK;
}

aclError aclrtGetResInCurrentThread(int32_t kind, uint32_t *value) {
    if (!valid(0, kind)) return refused();
    *value = in_thread.value[kind] ? in_thread.value[kind] : whole_card[kind];
    return OK;
}
