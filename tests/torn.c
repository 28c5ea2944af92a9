// Tears writes, for tests/kills.py: loaded into a process by LD_PRELOAD.
//
// The writes to files below $TORN_ROOT are counted in the file $TORN_COUNTER,
// 8 bytes. Of number $TORN_AT only half of the bytes are written. Then the
// process is killed; or, if $TORN_ERRNO is given, no more can be written, and
// that is the error. Without $TORN_AT they are only counted.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long *count;
static const char *root;
static long at;
static int error;

__attribute__((constructor)) static void begin(void) {
  const char *counter = getenv("TORN_COUNTER");
  root = getenv("TORN_ROOT");
  if (!counter || !root) return;
  if (getenv("TORN_AT")) at = atol(getenv("TORN_AT"));
  if (getenv("TORN_ERRNO")) error = atoi(getenv("TORN_ERRNO"));
  int fd = open(counter, O_RDWR | O_CREAT, 0666);
  if (fd < 0 || ftruncate(fd, sizeof *count)) abort();
  count = mmap(0, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (count == MAP_FAILED) abort();
  close(fd);
}

static int is_below_root(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return !strncmp(path, root, strlen(root));
}

// Returns whether the write is one like any other (1), the torn one (0), or one
// after a torn one (-1).
static int judge(int fd) {
  if (!count || !is_below_root(fd)) return 1;
  long number = atomic_fetch_add(count, 1) + 1;
  if (!at || number < at) return 1;
  return number == at ? 0 : -1;
}

static ssize_t tear(int fd, const void *data, size_t size, off_t offset) {
  ssize_t (*next)(int, const void *, size_t, off_t) =
      dlsym(RTLD_NEXT, "pwrite");
  ssize_t (*append)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
  ssize_t written = offset < 0 ? append(fd, data, size / 2)
                               : next(fd, data, size / 2, offset);
  if (!error) kill(getpid(), SIGKILL);
  if (written > 0) return written;
  errno = error;
  return -1;
}

#define WRITE(name, parameters, arguments, data, size, offset)   \
  ssize_t name parameters {                                      \
    static ssize_t (*next) parameters;                           \
    if (!next) next = dlsym(RTLD_NEXT, #name);                   \
    int verdict = judge(fd);                                     \
    if (!verdict) return tear(fd, data, size, offset);           \
    if (verdict < 0 && error) {                                  \
      errno = error;                                             \
      return -1;                                                 \
    }                                                            \
    return next arguments;                                       \
  }

WRITE(write, (int fd, const void *data, size_t size), (fd, data, size), data,
      size, -1)
WRITE(pwrite, (int fd, const void *data, size_t size, off_t offset),
      (fd, data, size, offset), data, size, offset)
WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t offset),
      (fd, data, size, offset), data, size, offset)
// Of several parts the first is torn, and the others are not written.
WRITE(writev, (int fd, const struct iovec *parts, int n), (fd, parts, n),
      parts->iov_base, parts->iov_len, -1)
WRITE(pwritev, (int fd, const struct iovec *parts, int n, off_t offset),
      (fd, parts, n, offset), parts->iov_base, parts->iov_len, offset)
WRITE(pwritev64, (int fd, const struct iovec *parts, int n, off64_t offset),
      (fd, parts, n, offset), parts->iov_base, parts->iov_len, offset)
