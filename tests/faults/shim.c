/* Preloaded into a command. Counts the calls that change files below a folder, and at one of them kills the process or fails.

   Python, whose files these are, calls the C library by name, so that the functions here come first. They call the next ones. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* KILLED: before the call. TORN: in the middle of a write. FULL: from this call on there is no room, and half a write goes through.
   BROKEN: this call fails, the next ones do not. */
enum { NOTHING, KILLED, TORN, FULL, BROKEN };
static char folder[PATH_MAX];
static int fault, chosen, trace = -1;
static atomic_int count;

void plan_fault(const char *below, const char *trace_file, int kind, int number) {
  strncpy(folder, below, sizeof folder - 1);
  trace = open(trace_file, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
  fault = kind, chosen = number, count = 0;
}

/* 0, or the error that the call to come fails with. *half: it is a write of which half goes through before. */
static int fails(const char *call, const char *path, int takes_room, int *half) {
  if (trace < 0 || !path || strncmp(path, folder, strlen(folder))) return 0;
  int number = ++count;
  dprintf(trace, "%s %s\n", call, path);
  if (number == chosen && fault == KILLED) kill(getpid(), SIGKILL);
  if (half) *half = number == chosen && (fault == TORN || fault == FULL);
  if (fault == BROKEN && number == chosen) return EIO;
  return fault == FULL && (half ? number > chosen : number == chosen || (takes_room && number > chosen)) ? ENOSPC : 0;
}

static const char *path_of(int fd, char *path) {
  char link[40];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = 0;
  return path;
}

#define NEXT(name) static __typeof__(name) *next; if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define CALL(name, path, takes_room, ...) \
  NEXT(name); \
  int error = fails(#name, path, takes_room, 0); \
  if (error) return errno = error, -1; \
  return next(__VA_ARGS__)

ssize_t write(int fd, const void *bytes, size_t size) {
  NEXT(write);
  char path[PATH_MAX];
  int half = 0, error = trace < 0 ? 0 : fails("write", path_of(fd, path), 1, &half);
  if (error) return errno = error, -1;
  ssize_t written = next(fd, bytes, half ? (size + 1) / 2 : size);
  if (half && fault == TORN) kill(getpid(), SIGKILL);
  return written;
}

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    CALL(name, flags & (O_CREAT | O_TRUNC) ? path : 0, 1, path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

int fsync(int fd) { char path[PATH_MAX]; CALL(fsync, path_of(fd, path), 1, fd); }
int ftruncate(int fd, off_t size) { char path[PATH_MAX]; CALL(ftruncate, path_of(fd, path), 0, fd, size); }
int ftruncate64(int fd, off64_t size) { char path[PATH_MAX]; CALL(ftruncate64, path_of(fd, path), 0, fd, size); }
int truncate(const char *path, off_t size) { CALL(truncate, path, 0, path, size); }
int truncate64(const char *path, off64_t size) { CALL(truncate64, path, 0, path, size); }
int rename(const char *from, const char *to) { CALL(rename, to, 0, from, to); }
int mkdir(const char *path, mode_t mode) { CALL(mkdir, path, 1, path, mode); }
int unlink(const char *path) { CALL(unlink, path, 0, path); }
int rmdir(const char *path) { CALL(rmdir, path, 0, path); }
