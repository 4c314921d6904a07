/* A stand-in for libnvidia-ml.so.1, steered by the text file that FAKE_NVML names.
 *
 * Each line of it is one of
 *   device INDEX UUID MIG TOTAL_BYTES USED_BYTES MILLIJOULES
 *   process DEVICE PID BYTES          (BYTES -1: not available; while it lives)
 *   ghost DEVICE PID BYTES            (listed whether it lives or not: dead, or another's number)
 *   busy DEVICE PERCENT               (of the device as a whole)
 *   lost DEVICE                       (fell off the bus: every call on it fails)
 *   sample DEVICE PID MICROSECONDS PERCENT
 *   instance DEVICE INDEX             (its processes are those of device 100 + INDEX)
 *   fail FUNCTION CODE                (nvmlReturn_t)
 *   hang FUNCTION                     (does not return as long as this line is there)
 * The file is read again at every call, so that a test can let the driver die in the middle. With
 * FAKE_NVML_MIXED in the environment each device is another model. Built with WITH_CUDA, it is CUDA's
 * driver too, which numbers the devices in the reverse order.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long long u64;
typedef struct { unsigned pid; u64 memory; unsigned gpu, compute; } ProcessInfo;
typedef struct { unsigned pid; u64 stamp; unsigned sm, mem, enc, dec; } Sample;
typedef struct { u64 total, free, used; } Memory;

#define OK 0
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7

static FILE *state(void) { const char *p = getenv("FAKE_NVML"); return p ? fopen(p, "r") : NULL; }

static int failure(const char *function) {
    char line[256], name[128]; int code, found = OK;
    FILE *f = state();
    if (!f) return 9; /* driver not loaded */
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "fail %127s %d", name, &code) == 2 && !strcmp(name, function)) found = code;
    fclose(f);
    return found;
}
static int hangs(const char *function) {
    char line[256], name[128]; int found = 0;
    FILE *f = state();
    if (!f) return 0;
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "hang %127s", name) == 1 && !strcmp(name, function)) found = 1;
    fclose(f);
    return found;
}

#define CHECK() do { \
    while (hangs(__func__)) usleep(10000); \
    int code = failure(__func__); if (code) return code; \
} while (0)

/* A handle is the device's number plus one; an instance's is its index plus 101. */
static int number(void *handle) { return (int)(long)handle - 1; }

static int lost(void *handle) {
    char line[256]; int d, found = 0;
    FILE *f = state();
    if (!f) return 0;
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "lost %d", &d) == 1 && d == number(handle)) found = 15; /* GPU is lost */
    fclose(f);
    return found;
}
#define CHECK_DEVICE() do { CHECK(); int gone = lost(handle); if (gone) return gone; } while (0)

static int device(int index, char *uuid, int *mig, u64 *total, u64 *used, u64 *millijoules) {
    char line[256], u[96]; int i, m, found = 0; u64 t, b, j;
    FILE *f = state();
    if (!f) return 0;
    while (!found && fgets(line, sizeof line, f))
        if (sscanf(line, "device %d %95s %d %llu %llu %llu", &i, u, &m, &t, &b, &j) == 6 && i == index) {
            found = 1;
            if (uuid) strcpy(uuid, u);
            if (mig) *mig = m;
            if (total) *total = t;
            if (used) *used = b;
            if (millijoules) *millijoules = j;
        }
    fclose(f);
    return found;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; CHECK(); return OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { (void)code; return "made up"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    CHECK();
    *count = 0;
    while (device((int)*count, NULL, NULL, NULL, NULL, NULL)) ++*count;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    CHECK();
    if (lost((void *)(long)(index + 1))) return 15;
    *handle = (void *)(long)(index + 1);
    return OK;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size) {
    (void)size; CHECK_DEVICE();
    return device(number(handle), uuid, NULL, NULL, NULL, NULL) ? OK : NOT_FOUND;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned size) {
    (void)size; CHECK_DEVICE();
    if (getenv("FAKE_NVML_MIXED")) sprintf(name, "Fake GPU %d", number(handle));
    else strcpy(name, "Fake GPU");
    return OK;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    CHECK_DEVICE();
    if (!device(number(handle), NULL, NULL, &memory->total, &memory->used, NULL)) return NOT_FOUND;
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    int mig = 0;
    CHECK_DEVICE();
    device(number(handle), NULL, &mig, NULL, NULL, NULL);
    *current = *pending = (unsigned)mig;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    (void)handle; CHECK_DEVICE();
    *count = 7;
    return OK;
}

#ifndef WITHOUT_INSTANCES
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **instance) {
    char line[256]; int d; unsigned i; int found = 0;
    CHECK_DEVICE();
    FILE *f = state();
    if (!f) return 9;
    while (!found && fgets(line, sizeof line, f))
        found = sscanf(line, "instance %d %u", &d, &i) == 2 && d == number(handle) && i == index;
    fclose(f);
    *instance = (void *)(long)(index + 101);
    return found ? OK : NOT_FOUND;
}
#endif

/* As a driver does: a process that has ended is listed no more; a "ghost" is. */
static int lives(unsigned pid) { char p[64]; sprintf(p, "/proc/%u", pid); return access(p, F_OK) == 0; }

#ifndef WITHOUT_PROCESSES
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, ProcessInfo *infos) {
    char line[256]; int d; unsigned pid, n = 0, room = *count; long long bytes;
    CHECK_DEVICE();
    FILE *f = state();
    if (!f) return 9;
    while (fgets(line, sizeof line, f))
        if ((sscanf(line, "ghost %d %u %lld", &d, &pid, &bytes) == 3 ||
             (sscanf(line, "process %d %u %lld", &d, &pid, &bytes) == 3 && lives(pid))) &&
            d == number(handle)) {
            if (infos && n < room) infos[n] = (ProcessInfo){pid, (u64)bytes, 0, 0};
            ++n;
        }
    fclose(f);
    *count = n;
    return n > room ? INSUFFICIENT_SIZE : OK;
}
#endif

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, ProcessInfo *infos) {
    (void)handle; (void)infos; CHECK_DEVICE();
    *count = 0;
    return OK;
}

int nvmlDeviceGetProcessUtilization(void *handle, Sample *samples, unsigned *count, u64 since) {
    char line[256]; int d; unsigned pid, percent, n = 0, room = *count; u64 stamp;
    CHECK_DEVICE();
    FILE *f = state();
    if (!f) return 9;
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "sample %d %u %llu %u", &d, &pid, &stamp, &percent) == 4 &&
            d == number(handle) && stamp > since) {
            if (samples && n < room) samples[n] = (Sample){pid, stamp, percent, 0, 0, 0};
            ++n;
        }
    fclose(f);
    *count = n;
    if (n == 0) return NOT_FOUND;
    return n > room ? INSUFFICIENT_SIZE : OK;
}

int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    char line[256]; int d, code = NOT_SUPPORTED; unsigned percent;
    CHECK_DEVICE();
    FILE *f = state();
    if (!f) return 9;
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "busy %d %u", &d, &percent) == 2 && d == number(handle)) {
            rates[0] = percent; rates[1] = 0; code = OK;
        }
    fclose(f);
    return code;
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, u64 *millijoules) {
    CHECK_DEVICE();
    return device(number(handle), NULL, NULL, NULL, NULL, millijoules) ? OK : NOT_SUPPORTED;
}

#ifdef WITH_CUDA
int cuInit(unsigned flags) { (void)flags; return OK; }
int cuDeviceGetCount(int *count) { return nvmlDeviceGetCount_v2((unsigned *)count); }
int cuDeviceGet(int *handle, int index) {
    int count;
    cuDeviceGetCount(&count);
    *handle = count - 1 - index;
    return OK;
}
int cuDeviceGetUuid(unsigned char *uuid, int handle) {
    char text[96];
    if (!device(handle, text, NULL, NULL, NULL, NULL)) return NOT_FOUND;
    char *from = text + strlen("GPU-");
    for (int i = 0; i < 16; ++i, from += 2) {
        unsigned byte;
        if (*from == '-') ++from;
        sscanf(from, "%2x", &byte);
        uuid[i] = (unsigned char)byte;
    }
    return OK;
}
#endif
