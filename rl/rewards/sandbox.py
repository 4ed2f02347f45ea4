"""Confines the calling process: no file writes outside one directory, no network, a limit of memory.

Scorers read completions, and some evaluate them. Landlock takes away file writes and signals to other
processes, a seccomp filter takes away sockets and the calls that would change other processes or a file's
mode, and both work without privileges and in
containers. Sources: ``Documentation/userspace-api/landlock.rst`` and ``seccomp_filter.rst`` of the Linux
    kernel.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from pathlib import Path

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# write a file; make or remove any kind of entry
_MAKE_AND_REMOVE = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))
_SINCE = {
    2: 1 << 13,
    3: 1 << 14,
    5: 1 << 15,
}  # link across directories, truncate, ioctl on devices: version → right
_TCP, _SIGNALS_AND_ABSTRACT_SOCKETS = 0b11, 0b11
_WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")

# By machine: the audit architecture, the numbers of seccomp, capget and capset, of prlimit64, and of what is
#     denied: socket,
# io_uring_setup, truncate, chmod, fchmod, chown, fchown, lchown, fchownat, fchmodat, fchmodat2, the three
# setxattr, the three removexattr, ptrace, process_vm_writev, pidfd_getfd, setpriority, unshare, setns, mount.
_X86_64 = (
    41,
    425,
    76,
    90,
    91,
    92,
    93,
    94,
    260,
    268,
    452,
    188,
    189,
    190,
    197,
    198,
    199,
    101,
    311,
    438,
    141,
    272,
    308,
    165,
)
_AARCH64 = (198, 425, 45, 52, 55, 54, 53, 452, 5, 6, 7, 14, 15, 16, 117, 271, 438, 140, 97, 268, 40)
_CALLS = {
    "x86_64": (0xC000003E, 317, 125, 126, 302, _X86_64),
    "aarch64": (0xC00000B7, 277, 90, 91, 261, _AARCH64),
}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _DENY = 0x7FFF0000, 0x00050000 | 1  # the second answers EPERM
_X32 = 0x40000000  # x86_64 has each call a second time from here on
_READ_ANY_FILE = 1 << 2  # CAP_DAC_READ_SEARCH
_NO_NEW_PRIVILEGES = 38
_FILE_BYTES = 1 << 28

_libc = ctypes.CDLL(None, use_errno=True)


def unconfined() -> list[str]:
    """What `confine` cannot take away on this machine, in words; empty where it takes away everything."""
    version = _landlock_version()
    missing = []
    if version < 1:
        missing.append("file writes (the kernel lacks Landlock)")
    if not _has_seccomp():
        missing.append("the network (the kernel lacks seccomp filters for this machine)")
    if version < 6:
        missing.append("signals to other processes (Linux 6.12 and later can)")
    return missing


def confine(writable: Path) -> None:
    """Takes away, for good, what this kernel can take away from the process and all that it starts.

    Threads that already run keep their file writes and signals, so that it comes before any code that is not
    trusted.

    Args:
        writable: The directory in which files may be written.

    Raises:
        OSError: when the kernel refuses something that it says it can do.
    """
    if sys.platform != "linux":
        return
    _drop_capabilities()
    _check(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    if _landlock_version() >= 1:
        _restrict_files(writable)
    if _has_seccomp():
        _filter_calls()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))


def limit_memory(gigabytes: float) -> None:
    """Lets the process allocate this much beyond what it holds; then Python raises MemoryError."""
    with Path("/proc/self/status").open(encoding="utf-8") as status:
        held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    most = held + int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def _landlock_version() -> int:
    """The version of the kernel's Landlock; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1), 0)


def _has_seccomp() -> bool:
    calls = _CALLS.get(platform.machine())
    if sys.platform != "linux" or calls is None:
        return False
    return _libc.syscall(calls[1], 2, 0, ctypes.byref(ctypes.c_uint32(_DENY & 0x7FFF0000))) == 0


def _drop_capabilities() -> None:
    """Root keeps the right to read every file, and no other."""
    calls = _CALLS.get(platform.machine())
    if calls is None:
        return
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    sets = ctypes.create_string_buffer(24)
    _check(_libc.syscall(calls[2], header, sets), "capget")
    effective, permitted, *_ = struct.unpack("6I", sets.raw[:24])
    kept = struct.pack("6I", effective & _READ_ANY_FILE, permitted & _READ_ANY_FILE, 0, 0, 0, 0)
    _check(_libc.syscall(calls[3], header, ctypes.create_string_buffer(kept)), "capset")


def _restrict_files(writable: Path) -> None:
    version = _landlock_version()
    rights = _MAKE_AND_REMOVE | sum(right for since, right in _SINCE.items() if version >= since)
    network, scopes = _TCP if version >= 4 else 0, _SIGNALS_AND_ABSTRACT_SOCKETS if version >= 6 else 0
    attributes = struct.pack("QQQ", rights, network, scopes)
    ruleset = _check(
        _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0),
        "landlock_create_ruleset",
    )
    file_rights = rights & (1 << 1 | 1 << 14)  # of a file that is no directory: write and truncate
    for path, allowed in ((str(writable), rights), *((device, file_rights) for device in _WRITABLE_DEVICES)):
        directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _check(
            _libc.syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, directory), 0),
            "landlock_add_rule",
        )
        os.close(directory)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _filter_calls() -> None:
    """Installs a BPF program, on all threads, that answers EPERM to what is denied."""
    architecture, seccomp, _, _, prlimit, denied = _CALLS[platform.machine()]
    tests = [(_AT_LEAST, _X32)] if platform.machine() == "x86_64" else []
    tests += [(_EQUAL, number) for number in denied]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 0, len(tests) + 4, architecture), (_LOAD, 0, 0, 0)]
    for place, (test, number) in enumerate(tests):
        program.append((test, len(tests) - place + 3, 0, number))
    # prlimit64 of the process itself (its first argument is 0) is what getrlimit and setrlimit are made of
    program += [
        (_EQUAL, 0, 2, prlimit),
        (_LOAD, 0, 0, 16),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _DENY),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    description = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _check(_libc.syscall(seccomp, 1, 1, description), "seccomp")
