"""Confines the calling process: no file writes outside one directory, no network, and a memory limit.

Scorers read completions, and some evaluate them. Landlock takes away file writes and signals to other
processes; a seccomp filter takes away sockets and the system calls that would change other processes or a
file's mode. Both work without privileges and in containers. Sources:
``Documentation/userspace-api/landlock.rst`` and ``seccomp_filter.rst`` of the Linux kernel.
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
# Landlock rights: write to a file, and create or remove any kind of directory entry
_WRITE_RIGHTS = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))
# Landlock version → right that it introduced: link across directories, truncate, ioctl on devices
_RIGHTS_SINCE_VERSION = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_TCP_RIGHTS, _SIGNALS_AND_ABSTRACT_SOCKETS = 0b11, 0b11
_WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")

# Numbers of the denied system calls: socket, io_uring_setup, truncate, chmod, fchmod, chown, fchown, lchown,
# fchownat, fchmodat, fchmodat2, the three setxattr, the three removexattr, ptrace, process_vm_writev,
# pidfd_getfd, setpriority, unshare, setns, mount.
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
# machine → audit architecture, numbers of seccomp, capget, capset and prlimit64, and the denied calls
_SYSTEM_CALLS = {
    "x86_64": (0xC000003E, 317, 125, 126, 302, _X86_64),
    "aarch64": (0xC00000B7, 277, 90, 91, 261, _AARCH64),
}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _DENY = 0x7FFF0000, 0x00050000 | 1  # a denied call fails with EPERM
_FIRST_X32_CALL = 0x40000000  # x86_64 numbers every call a second time from here on, for the x32 ABI
_CAP_DAC_READ_SEARCH = 1 << 2
_PR_SET_NO_NEW_PRIVS = 38
_MAX_FILE_BYTES = 1 << 28

_libc = ctypes.CDLL(None, use_errno=True)


def missing_confinement() -> list[str]:
    """Describes each restriction that `confine` cannot enforce here; empty if it can enforce all."""
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
    """Takes away permanently, from this process and its children, all that this kernel can take away.

    Threads that already run keep their file writes and signals, so call this before any untrusted code runs.

    Args:
        writable: Directory in which files may still be written.

    Raises:
        OSError: If the kernel rejects a restriction that it reports as supported.
    """
    if sys.platform != "linux":
        return
    _drop_capabilities()
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    if _landlock_version() >= 1:
        _restrict_files(writable)
    if _has_seccomp():
        _filter_calls()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))


def limit_memory(gigabytes: float) -> None:
    """Limits how much more memory the process may allocate; beyond it, Python raises MemoryError.

    Args:
        gigabytes: Limit in GB (10⁹ bytes), on top of what the process holds now.
    """
    with Path("/proc/self/status").open(encoding="utf-8") as status:
        held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    limit = held + int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _check(result: int, call: str) -> int:
    """Returns the result of a system call.

    Raises:
        OSError: If the result is negative.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def _landlock_version() -> int:
    """Returns the version of the kernel's Landlock; 0 if there is none."""
    if sys.platform != "linux":
        return 0
    return max(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1), 0)


def _has_seccomp() -> bool:
    """Whether the kernel supports seccomp filters on this machine's architecture."""
    calls = _SYSTEM_CALLS.get(platform.machine())
    if sys.platform != "linux" or calls is None:
        return False
    return _libc.syscall(calls[1], 2, 0, ctypes.byref(ctypes.c_uint32(_DENY & 0x7FFF0000))) == 0


def _drop_capabilities() -> None:
    """Drops all capabilities but the right to read every file, which root keeps."""
    calls = _SYSTEM_CALLS.get(platform.machine())
    if calls is None:
        return
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    sets = ctypes.create_string_buffer(24)
    _check(_libc.syscall(calls[2], header, sets), "capget")
    effective, permitted, *_ = struct.unpack("6I", sets.raw[:24])
    kept = struct.pack("6I", effective & _CAP_DAC_READ_SEARCH, permitted & _CAP_DAC_READ_SEARCH, 0, 0, 0, 0)
    _check(_libc.syscall(calls[3], header, ctypes.create_string_buffer(kept)), "capset")


def _restrict_files(writable: Path) -> None:
    """Applies a Landlock ruleset that allows writes only below ``writable`` and to a few devices.

    Where this kernel's Landlock can, it also denies TCP and signals to other processes.
    """
    version = _landlock_version()
    rights = _WRITE_RIGHTS | sum(right for since, right in _RIGHTS_SINCE_VERSION.items() if version >= since)
    network, scopes = _TCP_RIGHTS if version >= 4 else 0, _SIGNALS_AND_ABSTRACT_SOCKETS if version >= 6 else 0
    attributes = struct.pack("QQQ", rights, network, scopes)
    ruleset = _check(
        _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0),
        "landlock_create_ruleset",
    )
    file_rights = rights & (1 << 1 | 1 << 14)  # write and truncate, the rights that apply to a device
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
    """Installs, on all threads, a BPF program that makes the denied system calls fail with EPERM."""
    architecture, seccomp, _, _, prlimit, denied = _SYSTEM_CALLS[platform.machine()]
    tests = [(_AT_LEAST, _FIRST_X32_CALL)] if platform.machine() == "x86_64" else []
    tests += [(_EQUAL, number) for number in denied]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 0, len(tests) + 4, architecture), (_LOAD, 0, 0, 0)]
    for index, (test, number) in enumerate(tests):
        program.append((test, len(tests) - index + 3, 0, number))
    # prlimit64 is allowed for the process itself (first argument 0), since getrlimit and setrlimit use it
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
