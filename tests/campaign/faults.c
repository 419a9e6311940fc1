// Faults of the disk, for LD_PRELOAD: chosen calls of the C library fail, or bring a signal.
//
// The settings come from the environment when the library is loaded, and again when
// campaign_configure() is called (a forked process has its own):
//
//   FAULT_PATH     pattern (fnmatch) of the paths that are watched. Unset: the library is idle.
//   FAULT_CALLS    groups, comma-separated: open read write sync mkdir rename unlink stat list.
//                  Unset: all.
//   FAULT_AFTER    number of watched calls that pass before the first fault. Unset: 0.
//   FAULT_TIMES    number of calls that fail. Unset: all further ones.
//   FAULT_SECONDS  faults end so long after the settings were read. Unset: they never end.
//   FAULT_ERRNO    error number that a call gets. Unset: no error.
//   FAULT_SIGNAL   signal that the process gets before the call is made. Unset: none.
//   FAULT_TORN     1: half of a write is done before the signal comes.
//   FAULT_LOG      file that gets a line for every watched call: group, path, caller's library,
//                  and "fault" where it was one.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char pattern[4096], groups[256], log_path[4096];
static long after, times, error_number, signal_number, torn;
static double until;
static long watched, failed;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static long number(const char *name, long unset) {
  const char *text = getenv(name);
  return text && *text ? atol(text) : unset;
}

static void text(const char *name, char *target, size_t size) {
  const char *value = getenv(name);
  snprintf(target, size, "%s", value ? value : "");
}

__attribute__((constructor)) void campaign_configure(void) {
  text("FAULT_PATH", pattern, sizeof pattern);
  text("FAULT_CALLS", groups, sizeof groups);
  text("FAULT_LOG", log_path, sizeof log_path);
  after = number("FAULT_AFTER", 0);
  times = number("FAULT_TIMES", -1);
  error_number = number("FAULT_ERRNO", 0);
  signal_number = number("FAULT_SIGNAL", 0);
  torn = number("FAULT_TORN", 0);
  const char *seconds = getenv("FAULT_SECONDS");
  until = seconds && *seconds ? now() + atof(seconds) : 1e300;
  watched = failed = 0;
}

// Straight to the kernel, so that the log is not watched itself.
static void note(const char *group, const char *path, const void *caller, int fault) {
  if (!log_path[0]) return;
  Dl_info info;
  const char *library = caller && dladdr(caller, &info) && info.dli_fname ? info.dli_fname : "?";
  char line[9000];
  int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%s\n", group, path, library,
                        fault ? "fault" : "");
  long file = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND, 0644);
  if (file < 0) return;
  syscall(SYS_write, file, line, length);
  syscall(SYS_close, file);
}

static int in_groups(const char *group) {
  if (!groups[0]) return 1;
  const char *at = strstr(groups, group);
  size_t length = strlen(group);
  return at && (at == groups || at[-1] == ',') && (at[length] == 0 || at[length] == ',');
}

enum { PASS = 0, FAIL = 1, TORN = 2 };

static int judge(const char *group, const char *path, const void *caller) {
  if (!pattern[0] || !in_groups(group) || fnmatch(pattern, path, 0)) return PASS;
  long index = __atomic_fetch_add(&watched, 1, __ATOMIC_SEQ_CST);
  int fault = (error_number || signal_number) && index >= after && now() < until;
  if (fault && times >= 0) fault = __atomic_fetch_add(&failed, 1, __ATOMIC_SEQ_CST) < times;
  note(group, path, caller, fault);
  if (!fault) return PASS;
  if (torn && !strcmp(group, "write")) return TORN;
  if (signal_number) kill(getpid(), (int)signal_number);
  if (!error_number) return PASS;
  errno = (int)error_number;
  return FAIL;
}

static const char *of_descriptor(int descriptor, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, 4095);
  path[length > 0 ? length : 0] = 0;
  return path;
}

static const char *of_name(int folder, const char *name, char *path) {
  if (!name) name = "";
  if (name[0] == '/') return name;
  char base[4096];
  if (folder == AT_FDCWD) {
    if (syscall(SYS_getcwd, base, sizeof base) < 0) base[0] = 0;
  } else {
    of_descriptor(folder, base);
  }
  snprintf(path, 8192, "%s/%s", base, name);
  return path;
}

#define REAL(result, name, ...)                          \
  static result (*real)(__VA_ARGS__);                    \
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)
#define CALLER __builtin_return_address(0)
#define NAMED(group, folder, name, wrong)                                               \
  if (pattern[0]) {                                                                     \
    char path[8192];                                                                    \
    if (judge(group, of_name(folder, name, path), CALLER) == FAIL) return wrong;        \
  }
#define OPENED(group, descriptor, wrong)                                                \
  if (pattern[0]) {                                                                     \
    char path[4096];                                                                    \
    if (judge(group, of_descriptor(descriptor, path), CALLER) == FAIL) return wrong;    \
  }

static mode_t mode_of(int flags, va_list list) {
  return flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;
}

#define OPEN(name)                                       \
  int name(const char *path_, int flags, ...) {          \
    va_list list;                                        \
    va_start(list, flags);                               \
    mode_t mode = mode_of(flags, list);                  \
    va_end(list);                                        \
    REAL(int, name, const char *, int, ...);             \
    NAMED("open", AT_FDCWD, path_, -1)                   \
    return real(path_, flags, mode);                     \
  }
#define OPENAT(name)                                            \
  int name(int folder, const char *path_, int flags, ...) {     \
    va_list list;                                               \
    va_start(list, flags);                                      \
    mode_t mode = mode_of(flags, list);                         \
    va_end(list);                                               \
    REAL(int, name, int, const char *, int, ...);               \
    NAMED("open", folder, path_, -1)                            \
    return real(folder, path_, flags, mode);                    \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int file, void *data, size_t size) {
  REAL(ssize_t, read, int, void *, size_t);
  OPENED("read", file, -1)
  return real(file, data, size);
}
#define PREAD(name)                                             \
  ssize_t name(int file, void *data, size_t size, off_t at) {   \
    REAL(ssize_t, name, int, void *, size_t, off_t);            \
    OPENED("read", file, -1)                                    \
    return real(file, data, size, at);                          \
  }
PREAD(pread)
PREAD(pread64)
ssize_t readv(int file, const struct iovec *parts, int count) {
  REAL(ssize_t, readv, int, const struct iovec *, int);
  OPENED("read", file, -1)
  return real(file, parts, count);
}
#define PREADV(name)                                                            \
  ssize_t name(int file, const struct iovec *parts, int count, off_t at) {      \
    REAL(ssize_t, name, int, const struct iovec *, int, off_t);                 \
    OPENED("read", file, -1)                                                    \
    return real(file, parts, count, at);                                        \
  }
PREADV(preadv)
PREADV(preadv64)

// A torn write does half of its work before the signal. Only whole processes die of it: SIGKILL.
#define WRITTEN(file, half)                                                     \
  if (pattern[0]) {                                                             \
    char path[4096];                                                            \
    int verdict = judge("write", of_descriptor(file, path), CALLER);            \
    if (verdict == FAIL) return -1;                                             \
    if (verdict == TORN) {                                                      \
      half;                                                                     \
      kill(getpid(), (int)signal_number);                                       \
    }                                                                           \
  }
ssize_t write(int file, const void *data, size_t size) {
  REAL(ssize_t, write, int, const void *, size_t);
  WRITTEN(file, real(file, data, size / 2))
  return real(file, data, size);
}
#define PWRITE(name)                                                    \
  ssize_t name(int file, const void *data, size_t size, off_t at) {     \
    REAL(ssize_t, name, int, const void *, size_t, off_t);              \
    WRITTEN(file, real(file, data, size / 2, at))                       \
    return real(file, data, size, at);                                  \
  }
PWRITE(pwrite)
PWRITE(pwrite64)
ssize_t writev(int file, const struct iovec *parts, int count) {
  REAL(ssize_t, writev, int, const struct iovec *, int);
  WRITTEN(file, real(file, parts, count / 2))
  return real(file, parts, count);
}
#define PWRITEV(name)                                                           \
  ssize_t name(int file, const struct iovec *parts, int count, off_t at) {      \
    REAL(ssize_t, name, int, const struct iovec *, int, off_t);                 \
    WRITTEN(file, real(file, parts, count / 2, at))                             \
    return real(file, parts, count, at);                                        \
  }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define SYNC(name)                      \
  int name(int file) {                  \
    REAL(int, name, int);               \
    OPENED("sync", file, -1)            \
    return real(file);                  \
  }
SYNC(fsync)
SYNC(fdatasync)

int mkdir(const char *name, mode_t mode) {
  REAL(int, mkdir, const char *, mode_t);
  NAMED("mkdir", AT_FDCWD, name, -1)
  return real(name, mode);
}
int mkdirat(int folder, const char *name, mode_t mode) {
  REAL(int, mkdirat, int, const char *, mode_t);
  NAMED("mkdir", folder, name, -1)
  return real(folder, name, mode);
}
int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  NAMED("rename", AT_FDCWD, to, -1)
  return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
  REAL(int, renameat, int, const char *, int, const char *);
  NAMED("rename", b, to, -1)
  return real(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  REAL(int, renameat2, int, const char *, int, const char *, unsigned);
  NAMED("rename", b, to, -1)
  return real(a, from, b, to, flags);
}
#define UNLINK(name)                                    \
  int name(const char *path_) {                         \
    REAL(int, name, const char *);                      \
    NAMED("unlink", AT_FDCWD, path_, -1)                \
    return real(path_);                                 \
  }
UNLINK(unlink)
UNLINK(rmdir)
int unlinkat(int folder, const char *name, int flags) {
  REAL(int, unlinkat, int, const char *, int);
  NAMED("unlink", folder, name, -1)
  return real(folder, name, flags);
}

#define STAT(name, buffer)                              \
  int name(const char *path_, struct buffer *state) {   \
    REAL(int, name, const char *, struct buffer *);     \
    NAMED("stat", AT_FDCWD, path_, -1)                  \
    return real(path_, state);                          \
  }
#define FSTATAT(name, buffer)                                                           \
  int name(int folder, const char *path_, struct buffer *state, int flags) {            \
    REAL(int, name, int, const char *, struct buffer *, int);                           \
    NAMED("stat", folder, path_, -1)                                                    \
    return real(folder, path_, state, flags);                                           \
  }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

DIR *opendir(const char *name) {
  REAL(DIR *, opendir, const char *);
  NAMED("list", AT_FDCWD, name, NULL)
  return real(name);
}
DIR *fdopendir(int file) {
  REAL(DIR *, fdopendir, int);
  OPENED("list", file, NULL)
  return real(file);
}
