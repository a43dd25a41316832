# SPDX-License-Identifier: Apache-2.0
"""Numbers of the system calls that are run inside other tasks (arch/x86/entry/syscalls/syscall_64.tbl)."""

__all__ = ["NUMBERS"]

NUMBERS = {
    "read": 0, "write": 1, "open": 2, "close": 3, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "ioctl": 16, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20,
    "mremap": 25, "madvise": 28, "shmget": 29, "shmat": 30, "shmctl": 31, "dup": 32, "dup2": 33, "getitimer": 36,
    "setitimer": 38, "getpid": 39, "socket": 41, "sendmsg": 46, "recvmsg": 47, "fcntl": 72, "flock": 73, "chdir": 80,
    "fchdir": 81,
    "ftruncate": 77, "umask": 95, "getrlimit": 97, "setgid": 106, "setpgid": 109, "setsid": 112, "setgroups": 116,
    "setresuid": 117, "setresgid": 119, "setfsuid": 122, "setfsgid": 123, "capset": 126, "rt_sigqueueinfo": 129,
    "sigaltstack": 131, "personality": 135, "sched_setparam": 142, "sched_setscheduler": 144, "mlock": 149,
    "chroot": 161, "gettid": 186, "arch_prctl": 158, "prctl": 157, "io_setup": 206, "io_destroy": 207,
    "set_tid_address": 218, "timer_create": 222, "timer_settime": 223, "timer_gettime": 224, "timer_getoverrun": 225,
    "timer_delete": 226, "set_robust_list": 273, "openat": 257, "dup3": 292, "preadv": 295, "pwritev": 296,
    "rt_tgsigqueueinfo": 297, "prlimit64": 302, "seccomp": 317, "memfd_create": 319, "userfaultfd": 323,
    "membarrier": 324, "mlock2": 325, "rseq": 334, "pidfd_open": 434, "close_range": 436, "clone3": 435,
    "process_madvise": 440,
    "mseal": 462,
}  # fmt: skip
"""Name and number, for x86-64."""
