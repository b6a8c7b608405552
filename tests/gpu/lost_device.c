// A Vulkan loader whose device is lost as soon as the file LOST exists; all else goes to the loader REAL.
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

typedef void (*function)(void);
typedef function (*lookup)(void * object, const char * name);

enum { DEVICE_LOST = -4 };   // VK_ERROR_DEVICE_LOST

static void * real(const char * name) {
    static void * loader;
    loader = loader ? loader : dlopen(REAL, RTLD_NOW);
    return dlsym(loader, name);
}

static int is_lost(void) {
    return access(LOST, F_OK) == 0;
}

static int (*next_submit)(void * queue, uint32_t n, const void * submits, uint64_t fence);
static int (*next_status)(void * device, uint64_t fence);
static int (*next_wait)(void * device, uint32_t n, const uint64_t * fences, uint32_t all, uint64_t timeout);
static lookup next_device;

static int submit(void * queue, uint32_t n, const void * submits, uint64_t fence) {
    return is_lost() ? DEVICE_LOST : next_submit(queue, n, submits, fence);
}

static int status(void * device, uint64_t fence) {
    return is_lost() ? DEVICE_LOST : next_status(device, fence);
}

static int wait(void * device, uint32_t n, const uint64_t * fences, uint32_t all, uint64_t timeout) {
    return is_lost() ? DEVICE_LOST : next_wait(device, n, fences, all, timeout);
}

static function of_device(void * device, const char * name);

static function wrapped(const char * name, function found) {
    if (strcmp(name, "vkQueueSubmit") == 0) {
        next_submit = (void *) found;
        return (function) submit;
    }
    if (strcmp(name, "vkGetFenceStatus") == 0) {
        next_status = (void *) found;
        return (function) status;
    }
    if (strcmp(name, "vkWaitForFences") == 0) {
        next_wait = (void *) found;
        return (function) wait;
    }
    if (strcmp(name, "vkGetDeviceProcAddr") == 0) {
        next_device = (lookup) found;
        return (function) of_device;
    }
    return found;
}

static function of_device(void * device, const char * name) {
    return wrapped(name, next_device(device, name));
}

function vkGetInstanceProcAddr(void * instance, const char * name) {
    return wrapped(name, ((lookup) real("vkGetInstanceProcAddr"))(instance, name));
}

function vkGetDeviceProcAddr(void * device, const char * name) {
    next_device = (lookup) real("vkGetDeviceProcAddr");
    return of_device(device, name);
}

// what a runner and toy.devices call by name

void vkCmdCopyBuffer(void * commands, uint64_t from, uint64_t to, uint32_t n, const void * regions) {
    ((void (*)(void *, uint64_t, uint64_t, uint32_t, const void *)) real("vkCmdCopyBuffer"))(commands, from, to, n, regions);
}

void vkGetPhysicalDeviceFeatures2(void * device, void * features) {
    ((void (*)(void *, void *)) real("vkGetPhysicalDeviceFeatures2"))(device, features);
}

int vkCreateInstance(const void * info, const void * allocator, void ** instance) {
    return ((int (*)(const void *, const void *, void **)) real("vkCreateInstance"))(info, allocator, instance);
}

int vkEnumeratePhysicalDevices(void * instance, uint32_t * n, void ** devices) {
    return ((int (*)(void *, uint32_t *, void **)) real("vkEnumeratePhysicalDevices"))(instance, n, devices);
}

void vkGetPhysicalDeviceProperties(void * device, void * properties) {
    ((void (*)(void *, void *)) real("vkGetPhysicalDeviceProperties"))(device, properties);
}
