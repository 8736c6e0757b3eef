/* A driver that answers as its environment says: libcuda.so.1 and libnvidia-ml.so.1 in one. */
#include <stdlib.h>
#include <stdio.h>

static double said(const char *name) { return atof(getenv(name) ? getenv(name) : "0"); }

int cuInit(unsigned flags) { return (int)said("FAKE_FAULT"); }
int cuDriverGetVersion(int *version) { *version = (int)said("FAKE_CUDA"); return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "Stand-in"); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)(said("FAKE_GB") * 1073741824.0); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int tenths = (int)(said("FAKE_CAPABILITY") * 10 + 0.5);
    *value = attribute == 75 ? tenths / 10 : tenths % 10;
    return 0;
}
int nvmlInit_v2(void) { return getenv("FAKE_DRIVER") ? 0 : 1; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { snprintf(text, length, "%s", getenv("FAKE_DRIVER")); return 0; }
