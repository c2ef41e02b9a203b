/* HCCL, CANN's library of collectives: every call is handed to Python (qwen2_npu/emulator/collectives), which computes
 * it over gloo. A call completes before it returns, as all work on emulated streams does.
 *
 * Signatures follow CANN's hccl.h. Functions whose names start with emu_ are this project's own controls.
 */
#include "emulator.h"

typedef int HcclResult;

enum { HCCL_SUCCESS = 0, HCCL_E_PARA = 1, HCCL_E_MEMORY = 3, HCCL_E_UNAVAIL = 7 };
enum { NAME_LENGTH = 128, CONFIG_NAME = 32 /* offset of hcclCommName in HcclCommConfig */ };

/* The handle that torch_npu holds. Python fills in all but the name it is created with. */
typedef struct {
    uint64_t id;
    uint32_t rank, size;
    char name[NAME_LENGTH];
} Comm;

enum {
    ALL_REDUCE, REDUCE, BROADCAST, ALL_GATHER, ALL_GATHER_V, REDUCE_SCATTER, REDUCE_SCATTER_V, SCATTER,
    ALL_TO_ALL, ALL_TO_ALL_V, ALL_TO_ALL_VC, BARRIER, SEND, RECEIVE,
};

/* One call. What a kind does not have is zero; counts and offsets are in elements, one per rank. */
typedef struct {
    int32_t kind, dtype, op;
    uint32_t peer; /* root, or the other rank of a send or receive */
    uint64_t count;
    const void *send;
    void *receive;
    const uint64_t *send_counts, *send_offsets, *receive_counts, *receive_offsets;
    Comm *comm;
} Call;

typedef struct {
    HcclResult (*root_info)(char *info);
    HcclResult (*open)(Comm *comm, const char *info);
    HcclResult (*run)(const Call *calls, uint32_t count); /* several: sends and receives that go together */
    HcclResult (*close)(Comm *comm);
} Handlers;

static Handlers handlers;

void emu_set_hccl_handlers(const Handlers *given) {
    if (given) handlers = *given;
    else memset(&handlers, 0, sizeof handlers); /* the interpreter ends; threads of torch_npu may still call */
}

/* ---- communicators -------------------------------------------------------------------------------------------- */

HcclResult HcclGetRootInfo(char *info) { return handlers.root_info ? handlers.root_info(info) : HCCL_E_UNAVAIL; }

static HcclResult open_comm(uint32_t size, const char *info, uint32_t rank, const char *name, Comm **result) {
    if (!handlers.open) return HCCL_E_UNAVAIL;
    Comm *comm = calloc(1, sizeof *comm);
    if (!comm) return HCCL_E_MEMORY;
    comm->rank = rank;
    comm->size = size;
    if (name) strncpy(comm->name, name, NAME_LENGTH - 1);
    HcclResult error = handlers.open(comm, info);
    if (error == HCCL_SUCCESS) *result = comm;
    else free(comm);
    return error;
}

HcclResult HcclCommInitRootInfo(uint32_t size, const char *info, uint32_t rank, Comm **comm) {
    return open_comm(size, info, rank, NULL, comm);
}

HcclResult HcclCommInitRootInfoConfig(uint32_t size, const char *info, uint32_t rank, const char *config, Comm **comm) {
    return open_comm(size, info, rank, config + CONFIG_NAME, comm);
}

HcclResult HcclCommDestroy(Comm *comm) {
    HcclResult error = handlers.close ? handlers.close(comm) : HCCL_SUCCESS;
    free(comm);
    return error;
}

uint32_t HcclGetCommConfigCapability(void) { return 12; /* all of hccl_types.h's HcclCommConfigCapability */ }
HcclResult HcclGetCommName(Comm *comm, char *name) { strcpy(name, comm->name); return HCCL_SUCCESS; }
HcclResult HcclGetRankSize(Comm *comm, uint32_t *size) { *size = comm->size; return HCCL_SUCCESS; }
HcclResult HcclGetRankId(Comm *comm, uint32_t *rank) { *rank = comm->rank; return HCCL_SUCCESS; }

/* Errors come back from the call itself. */
HcclResult HcclGetCommAsyncError(UNUSED Comm *comm, HcclResult *error) { *error = HCCL_SUCCESS; return HCCL_SUCCESS; }

/* ---- groups of sends and receives ------------------------------------------------------------------------------ */

static __thread uint32_t depth, waiting, room;
static __thread Call *group;

static HcclResult run(Call call) {
    int point_to_point = call.kind == SEND || call.kind == RECEIVE;
    if (!handlers.run) return HCCL_E_UNAVAIL;
    if (!depth || !point_to_point) return handlers.run(&call, 1);
    if (waiting == room) {
        uint32_t more = room ? 2 * room : 16;
        Call *larger = realloc(group, more * sizeof *group);
        if (!larger) return HCCL_E_MEMORY;
        group = larger;
        room = more;
    }
    group[waiting++] = call;
    return HCCL_SUCCESS;
}

HcclResult HcclGroupStart(void) { depth++; return HCCL_SUCCESS; }

HcclResult HcclGroupEnd(void) {
    if (!depth) return HCCL_E_PARA;
    if (--depth || !waiting) return HCCL_SUCCESS;
    uint32_t count = waiting;
    waiting = 0;
    return handlers.run ? handlers.run(group, count) : HCCL_E_UNAVAIL;
}

typedef struct {
    int32_t type; /* 0: send, 1: receive */
    void *buffer;
    uint64_t count;
    int32_t dtype;
    uint32_t peer;
} Item;

static HcclResult send_or_receive(int kind, void *buffer, uint64_t count, int dtype, uint32_t peer, Comm *comm) {
    return run((Call){.kind = kind, .dtype = dtype, .peer = peer, .count = count, .send = buffer, .receive = buffer,
                      .comm = comm});
}

HcclResult HcclSend(void *buffer, uint64_t count, int dtype, uint32_t peer, Comm *comm, UNUSED void *stream) {
    return send_or_receive(SEND, buffer, count, dtype, peer, comm);
}

HcclResult HcclRecv(void *buffer, uint64_t count, int dtype, uint32_t peer, Comm *comm, UNUSED void *stream) {
    return send_or_receive(RECEIVE, buffer, count, dtype, peer, comm);
}

HcclResult HcclBatchSendRecv(Item *items, uint32_t count, Comm *comm, UNUSED void *stream) {
    HcclResult error = HcclGroupStart();
    for (uint32_t i = 0; i < count && error == HCCL_SUCCESS; i++)
        error = send_or_receive(items[i].type ? RECEIVE : SEND, items[i].buffer, items[i].count, items[i].dtype,
                                items[i].peer, comm);
    HcclResult end = HcclGroupEnd();
    return error == HCCL_SUCCESS ? end : error;
}

/* ---- collectives ---------------------------------------------------------------------------------------------- */

HcclResult HcclAllReduce(void *send, void *receive, uint64_t count, int dtype, int op, Comm *comm,
                         UNUSED void *stream) {
    return run((Call){.kind = ALL_REDUCE, .dtype = dtype, .op = op, .count = count, .send = send, .receive = receive,
                      .comm = comm});
}

HcclResult HcclReduce(void *send, void *receive, uint64_t count, int dtype, int op, uint32_t root, Comm *comm,
                      UNUSED void *stream) {
    return run((Call){.kind = REDUCE, .dtype = dtype, .op = op, .peer = root, .count = count, .send = send,
                      .receive = receive, .comm = comm});
}

HcclResult HcclBroadcast(void *buffer, uint64_t count, int dtype, uint32_t root, Comm *comm, UNUSED void *stream) {
    return run((Call){.kind = BROADCAST, .dtype = dtype, .peer = root, .count = count, .send = buffer,
                      .receive = buffer, .comm = comm});
}

HcclResult HcclAllGather(void *send, void *receive, uint64_t count, int dtype, Comm *comm, UNUSED void *stream) {
    return run((Call){.kind = ALL_GATHER, .dtype = dtype, .count = count, .send = send, .receive = receive,
                      .comm = comm});
}

HcclResult HcclAllGatherV(void *send, uint64_t count, void *receive, const void *counts, const void *offsets,
                          int dtype, Comm *comm, UNUSED void *stream) {
    return run((Call){.kind = ALL_GATHER_V, .dtype = dtype, .count = count, .send = send, .receive = receive,
                      .receive_counts = counts, .receive_offsets = offsets, .comm = comm});
}

HcclResult HcclReduceScatter(void *send, void *receive, uint64_t count, int dtype, int op, Comm *comm,
                             UNUSED void *stream) {
    return run((Call){.kind = REDUCE_SCATTER, .dtype = dtype, .op = op, .count = count, .send = send,
                      .receive = receive, .comm = comm});
}

HcclResult HcclReduceScatterV(void *send, const void *counts, const void *offsets, void *receive, uint64_t count,
                              int dtype, int op, Comm *comm, UNUSED void *stream) {
    return run((Call){.kind = REDUCE_SCATTER_V, .dtype = dtype, .op = op, .count = count, .send = send,
                      .receive = receive, .send_counts = counts, .send_offsets = offsets, .comm = comm});
}

HcclResult HcclScatter(void *send, void *receive, uint64_t count, int dtype, uint32_t root, Comm *comm,
                       UNUSED void *stream) {
    return run((Call){.kind = SCATTER, .dtype = dtype, .peer = root, .count = count, .send = send, .receive = receive,
                      .comm = comm});
}

HcclResult HcclAlltoAll(const void *send, uint64_t count, int dtype, void *receive, uint64_t receive_count,
                        int receive_dtype, Comm *comm, UNUSED void *stream) {
    if (count != receive_count || dtype != receive_dtype) return HCCL_E_PARA;
    return run((Call){.kind = ALL_TO_ALL, .dtype = dtype, .count = count, .send = send, .receive = receive,
                      .comm = comm});
}

HcclResult HcclAlltoAllV(const void *send, const void *send_counts, const void *send_offsets, int dtype, void *receive,
                         const void *receive_counts, const void *receive_offsets, int receive_dtype, Comm *comm,
                         UNUSED void *stream) {
    if (dtype != receive_dtype) return HCCL_E_PARA;
    return run((Call){.kind = ALL_TO_ALL_V, .dtype = dtype, .send = send, .receive = receive,
                      .send_counts = send_counts, .send_offsets = send_offsets, .receive_counts = receive_counts,
                      .receive_offsets = receive_offsets, .comm = comm});
}

/* counts: a matrix of size x size, row i what rank i sends. */
HcclResult HcclAlltoAllVC(const void *send, const void *counts, int dtype, void *receive, int receive_dtype, Comm *comm,
                          UNUSED void *stream) {
    if (dtype != receive_dtype) return HCCL_E_PARA;
    return run((Call){.kind = ALL_TO_ALL_VC, .dtype = dtype, .send = send, .receive = receive, .send_counts = counts,
                      .comm = comm});
}

HcclResult HcclBarrier(Comm *comm, UNUSED void *stream) { return run((Call){.kind = BARRIER, .comm = comm}); }
