/* The stand-in of gpu.c, with communicators that are made, polled and ended, and say so. They carry nothing. */
#include <stdio.h>
#include <time.h>

#include "gpu.c"

enum { SUCCESS = 0, REMOTE_ERROR = 6, IN_PROGRESS = 7 };

struct communicator {
    int rank, finalized;
    struct timespec since;
};

static void say(const char *what, const struct communicator *comm) {
    printf("nccl: %s of rank %d\n", what, comm->rank);
    fflush(stdout);
}

static struct communicator *make(int rank) {
    struct communicator *comm = calloc(1, sizeof *comm);
    comm->rank = rank;
    clock_gettime(CLOCK_MONOTONIC, &comm->since);
    return comm;
}

static long age_ms(const struct communicator *comm) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - comm->since.tv_sec) * 1000 + (now.tv_nsec - comm->since.tv_nsec) / 1000000;
}

/* libcuda: a context and streams that are only names */
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)8; return 0; }
int cuCtxSetCurrent(void *context) { (void)context; return 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -1; return 0; }
int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    (void)flags, (void)priority;
    *stream = (void *)16;
    return 0;
}
int cuStreamDestroy_v2(void *stream) { (void)stream; return 0; }

/* libnccl */
struct id { char internal[128]; };
int ncclGetUniqueId(struct id *id) { memset(id, 1, sizeof *id); return SUCCESS; }
int ncclCommInitRankConfig(void **comm, int size, struct id id, int rank, void *config) {
    (void)size, (void)id, (void)config;
    *comm = make(rank);
    return IN_PROGRESS;
}
int ncclCommSplit(void *parent, int color, int key, void **comm, void *config) {
    (void)color, (void)key, (void)config;
    *comm = make(((struct communicator *)parent)->rank);
    return IN_PROGRESS;
}
int ncclCommGetAsyncError(void *comm, int *state) {
    struct communicator *self = comm;
    long fails = setting("STAND_IN_FAILS_AFTER_MS", -1);
    if (setting("STAND_IN_NEVER_JOINS", 0) || (self->finalized && setting("STAND_IN_NEVER_LEAVES", 0)))
        *state = IN_PROGRESS;
    else if (fails >= 0 && age_ms(self) >= fails)
        *state = REMOTE_ERROR;
    else
        *state = age_ms(self) < 5 ? IN_PROGRESS : SUCCESS;
    return SUCCESS;
}
int ncclCommFinalize(void *comm) {
    ((struct communicator *)comm)->finalized = 1;
    say("finalize", comm);
    return IN_PROGRESS;
}
int ncclCommDestroy(void *comm) { say("destroy", comm); free(comm); return SUCCESS; }
int ncclCommAbort(void *comm) { say("abort", comm); free(comm); return SUCCESS; }
const char *ncclGetErrorString(int result) { return result == REMOTE_ERROR ? "remote error, says the stand-in" : "other"; }
const char *ncclGetLastError(void *comm) { (void)comm; return "peer 1 is gone"; }
