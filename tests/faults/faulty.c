/* A library to be preloaded: it makes system calls of a process fail, and kills the process at named points.
 *
 * FAULTS    rules "call:path:first:count:what", separated by ";". A rule counts the calls of its name ("any" for every
 *           one of them) whose path matches the pattern; the calls from number first on, count of them, meet what:
 *           an errno's number, "kill" (before the call), "dead" (after it), or "torn" (half of a write, then kill).
 * FAULTS_LOG  a file to which every call that could fail is written, so that the points can be named.
 * FAULTS_CLOCK  seconds by which the wall clock jumps, forth and back, every hundred times it is asked.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
enum { GO_ON, FAIL, DEAD, TORN };

typedef struct { char call[16], path[256], what[16]; long first, count, seen; } Rule;
static Rule rules[16];
static int rule_count, log_file = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void read_rules(void) {
    char *text = getenv("FAULTS"), *rest = text ? strdup(text) : NULL, *part;
    while (rest && (part = strsep(&rest, ";")) && rule_count < 16) {
        Rule *r = &rules[rule_count];
        if (sscanf(part, "%15[^:]:%255[^:]:%ld:%ld:%15s", r->call, r->path, &r->first, &r->count, r->what) == 5)
            rule_count++;
    }
    if (getenv("FAULTS_LOG")) log_file = open(getenv("FAULTS_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* Say what this call meets; errno is set where it is to fail. */
static int meet(const char *call, const char *path) {
    int found = GO_ON;
    if (!rule_count && log_file < 0) return GO_ON;
    pthread_mutex_lock(&lock);
    if (log_file >= 0) {
        char line[512];
        int length = snprintf(line, sizeof line, "%s %s\n", call, path);
        long (*raw)(long, ...) = dlsym(RTLD_NEXT, "syscall");
        raw(1, (long)log_file, line, (long)length);
    }
    for (int i = 0; i < rule_count && !found; i++) {
        Rule *r = &rules[i];
        if ((strcmp(r->call, "any") && strcmp(r->call, call)) || fnmatch(r->path, path, 0)) continue;
        long number = ++r->seen;
        if (number < r->first || (r->count >= 0 && number >= r->first + r->count)) continue;
        if (!strcmp(r->what, "kill")) die();
        else if (!strcmp(r->what, "dead")) found = DEAD;
        else if (!strcmp(r->what, "torn")) found = TORN;
        else { errno = atoi(r->what); found = FAIL; }
    }
    int kept = errno;
    pthread_mutex_unlock(&lock);
    errno = kept;
    return found;
}

static int meet_file(const char *call, int file) {
    char link[64], path[512];
    if (!rule_count && log_file < 0) return GO_ON;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0 || path[0] != '/') return GO_ON;
    path[length] = 0;
    return meet(call, path);
}

#define CALL(type, name, label, file, passed, ...)                                                               \
    type name(__VA_ARGS__) {                                                                                           \
        REAL(type, name, __VA_ARGS__);                                                                                 \
        int what = meet_file(label, file);                                                                             \
        if (what == FAIL) return -1;                                                                                   \
        type result = real passed;                                                                                     \
        if (what == DEAD || what == TORN) die();                                                                       \
        return result;                                                                                                 \
    }

CALL(ssize_t, read, "read", f, (f, b, n), int f, void *b, size_t n)
CALL(ssize_t, pread, "read", f, (f, b, n, o), int f, void *b, size_t n, off_t o)
CALL(ssize_t, pread64, "read", f, (f, b, n, o), int f, void *b, size_t n, off64_t o)
CALL(ssize_t, preadv, "read", f, (f, v, n, o), int f, const struct iovec *v, int n, off_t o)
CALL(ssize_t, preadv64, "read", f, (f, v, n, o), int f, const struct iovec *v, int n, off64_t o)
CALL(ssize_t, preadv2, "read", f, (f, v, n, o, g), int f, const struct iovec *v, int n, off_t o, int g)
CALL(ssize_t, preadv64v2, "read", f, (f, v, n, o, g), int f, const struct iovec *v, int n, off64_t o, int g)
CALL(int, fsync, "fsync", f, (f), int f)
CALL(int, fdatasync, "fsync", f, (f), int f)
CALL(int, ftruncate, "truncate", f, (f, n), int f, off_t n)
CALL(int, ftruncate64, "truncate", f, (f, n), int f, off64_t n)

ssize_t write(int f, const void *b, size_t n) {
    REAL(ssize_t, write, int, const void *, size_t);
    int what = meet_file("write", f);
    if (what == FAIL) return -1;
    ssize_t result = real(f, b, what == TORN && n > 1 ? n / 2 : n);
    if (what == DEAD || what == TORN) die();
    return result;
}

ssize_t writev(int f, const struct iovec *v, int n) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    int what = meet_file("write", f);
    if (what == FAIL) return -1;
    ssize_t result = real(f, v, what == TORN && n > 1 ? n / 2 : n);
    if (what == DEAD || what == TORN) die();
    return result;
}

#define NAMED(name, label, path, passed, ...)                                                                          \
    int name(__VA_ARGS__) {                                                                                            \
        REAL(int, name, __VA_ARGS__);                                                                                  \
        int what = meet(label, path);                                                                                  \
        if (what == FAIL) return -1;                                                                                   \
        int result = real passed;                                                                                      \
        if (what == DEAD || what == TORN) die();                                                                       \
        return result;                                                                                                 \
    }

NAMED(rename, "rename", to, (from, to), const char *from, const char *to)
NAMED(renameat, "rename", to, (d, from, e, to), int d, const char *from, int e, const char *to)
NAMED(unlink, "unlink", path, (path), const char *path)
NAMED(unlinkat, "unlink", path, (d, path, flags), int d, const char *path, int flags)
NAMED(mkdir, "mkdir", path, (path, mode), const char *path, mode_t mode)
NAMED(symlink, "symlink", path, (target, path), const char *target, const char *path)

static int created(const char *path, int flags) { return flags & O_CREAT ? meet("create", path) : GO_ON; }

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        REAL(int, name, const char *, int, ...);                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                        \
        va_end(rest);                                                                                                  \
        int what = created(path, flags);                                                                               \
        if (what == FAIL) return -1;                                                                                   \
        int result = real(path, flags, mode);                                                                          \
        if (what == DEAD || what == TORN) die();                                                                       \
        return result;                                                                                                 \
    }

OPEN(open)
OPEN(open64)

/* Allocations from 128 KiB on are calls, too, of the name "alloc". */
static int refused(size_t size) { return size >= 128 << 10 && meet("alloc", "memory") == FAIL; }

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

void *malloc(size_t n) { return refused(n) ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t size) { return refused(n * size) ? NULL : __libc_calloc(n, size); }
void *realloc(void *old, size_t n) { return refused(n) ? NULL : __libc_realloc(old, n); }
void *aligned_alloc(size_t align, size_t n) { return refused(n) ? NULL : __libc_memalign(align, n); }

int posix_memalign(void **place, size_t align, size_t n) {
    if (refused(n)) return ENOMEM;
    void *found = __libc_memalign(align, n);
    if (!found) return ENOMEM;
    *place = found;
    return 0;
}

void *mmap64(void *where, size_t n, int protection, int flags, int file, off64_t offset) {
    REAL(void *, mmap64, void *, size_t, int, int, int, off64_t);
    if (file < 0 && !(flags & MAP_NORESERVE) && refused(n)) return MAP_FAILED;
    return real(where, n, protection, flags, file, offset);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    static long jump = -1, asked;
    int result = real(clock, time);
    if (jump < 0) jump = getenv("FAULTS_CLOCK") ? atol(getenv("FAULTS_CLOCK")) : 0;
    if (jump && clock == CLOCK_REALTIME && result == 0 && __atomic_fetch_add(&asked, 1, __ATOMIC_RELAXED) / 100 % 2)
        time->tv_sec += jump;
    return result;
}
