/* A stand-in for libcuda and libnccl that answers what is asked before a GPU is touched, as the environment says. It computes
 * nothing and is no evidence of anything that a GPU does: whatever else is called of it is missing, and a panic. */
#include <stdlib.h>
#include <string.h>

static int setting(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

/* libcuda */
int cuInit(unsigned flags) { (void)flags; return setting("STAND_IN_INIT", 0); }
int cuDriverGetVersion(int *version) { *version = setting("STAND_IN_DRIVER", 13000); return 0; }
int cuDeviceGetCount(int *count) { *count = setting("STAND_IN_DEVICES", 1); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    memset(uuid, 7, 16);
    uuid[15] = (unsigned char)device;
    return 0;
}
int cuGetErrorString(int error, const char **text) { (void)error; *text = "said by the stand-in"; return 0; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

/* libnccl */
int ncclGetVersion(int *version) { *version = setting("STAND_IN_NCCL", 22809); return 0; }
