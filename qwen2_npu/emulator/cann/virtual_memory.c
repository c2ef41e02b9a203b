/* CANN's virtual memory, which torch_npu's expandable segments use: addresses are reserved first, and physical memory,
 * counted against the card, is mapped into them in pieces. Here a mapping makes anonymous memory accessible. */
#include "emulator.h"

#include <sys/mman.h>

typedef struct Area {
    void *start;
    size_t size;
    struct Area *next;
} Area;

typedef struct {
    size_t size;
    int32_t device;
} Physical;

typedef struct {
    int32_t handle_type, allocation_type, attribute;
    uint32_t device;
    int32_t location_type;
    uint64_t reserved;
} PhysicalProperties;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Area *reserved = NULL, *mapped = NULL;

static void remember(Area **list, void *start, size_t size) {
    Area *area = malloc(sizeof *area);
    pthread_mutex_lock(&lock);
    *area = (Area){start, size, *list};
    *list = area;
    pthread_mutex_unlock(&lock);
}

/* The size of what was remembered at start, 0 if nothing was. */
static size_t forget(Area **list, void *start) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (Area **link = list; *link; link = &(*link)->next) {
        if ((*link)->start != start) continue;
        Area *area = *link;
        size = area->size;
        *link = area->next;
        free(area);
        break;
    }
    pthread_mutex_unlock(&lock);
    return size;
}

aclError aclrtReserveMemAddress(void **start, size_t size, UNUSED size_t alignment, UNUSED void *wanted,
                                UNUSED uint64_t flags) {
    void *area = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) return emu_fail(ERROR_MEMORY, "%zu bytes of addresses cannot be reserved", size);
    remember(&reserved, area, size);
    *start = area;
    return OK;
}

aclError aclrtReleaseMemAddress(void *start) {
    size_t size = forget(&reserved, start);
    if (!size) return emu_fail(ERROR_INVALID_PARAM, "no addresses were reserved at %p", start);
    munmap(start, size);
    return OK;
}

aclError aclrtMallocPhysical(void **handle, size_t size, const PhysicalProperties *properties, UNUSED uint64_t flags) {
    aclError error = emu_take_memory((int32_t)properties->device, size);
    if (error != OK) return error;
    Physical *physical = malloc(sizeof *physical);
    *physical = (Physical){size, (int32_t)properties->device};
    *handle = physical;
    return OK;
}

aclError aclrtFreePhysical(void *handle) {
    Physical *physical = handle;
    emu_give_memory(physical->device, physical->size);
    free(physical);
    return OK;
}

aclError aclrtMapMem(void *start, size_t size, size_t offset, void *handle, UNUSED uint64_t flags) {
    if (offset || size > ((Physical *)handle)->size)
        return emu_fail(ERROR_INVALID_PARAM, "%zu bytes from %zu on do not fit what was allocated", size, offset);
    if (mprotect(start, size, PROT_READ | PROT_WRITE)) return emu_fail(ERROR_MEMORY, "%p cannot be mapped", start);
    remember(&mapped, start, size);
    emu_note_allocation(start, size, ((Physical *)handle)->device);
    return OK;
}

aclError aclrtUnmapMem(void *start) {
    size_t size = forget(&mapped, start);
    if (!size) return emu_fail(ERROR_INVALID_PARAM, "nothing is mapped at %p", start);
    emu_forget_allocation(start);
    /* Fresh, inaccessible pages in its place: the contents are gone, and a stale pointer is caught. */
    mmap(start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return OK;
}
