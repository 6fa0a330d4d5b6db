"""What this machine has, and what this process may use of it. Needs nothing but the standard library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from petseg_runtime import __version__

__all__ = [
    "LOOK_UP",
    "MASK_PACKAGES",
    "PACKAGES",
    "Cpu",
    "Gpu",
    "Host",
    "available_memory",
    "cgroup_limits",
    "cgroup_memory_left",
    "cores",
    "features",
    "frequencies",
    "give_back_memory",
    "gpus",
    "host",
    "identity",
    "limits",
    "nvidia_gpus",
    "old_driver",
    "parse_cpuinfo",
    "temperatures",
    "usable_cpus",
    "versions",
]

#: A signal that comes just when Python's main thread begins to wait for another thread does not wake it: its handler
#: would wait, too. So what may wait for long looks up this often, in seconds.
LOOK_UP: Final = 0.5

# What inference engines have kernels for, in the kernel's spelling: x86-64, then ARM.
FEATURES: Final = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)

#: ARM's processors have numbers, not names (implementer 0x41); those of boards people own, from util-linux's lscpu.
_ARM: Final = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}

#: Where Linux mounts control groups.
_CGROUPS: Final = Path("/sys/fs/cgroup")

#: Packages that a mask comes from, of which another version may give another one: what reads photos, and all engines.
MASK_PACKAGES: Final = (
    *("pillow", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-rtx", "tensorrt-rtx-cu12"),
)
#: These, and the others whose versions are told with results.
PACKAGES: Final = ("numpy", *MASK_PACKAGES, "av", "cuda-bindings")


#: ONNX Runtime for CUDA 12 with its libraries: from 1.27 on, that on PyPI is for CUDA 13.
ONNXRUNTIME_CUDA12: Final = "'onnxruntime-gpu[cuda,cudnn]<1.27'"


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The processor, and how much of it and of the memory this process may use.

    Attributes:
        name: As the kernel calls it; "unknown" if it does not.
        machine: The architecture ("x86_64", "aarch64").
        cores: That the scheduler may put this process on.
        quota: CPUs' worth of time that the control group allows, None if it sets no limit.
        memory: Of the machine, in bytes.
        memory_limit: Of the control group, in bytes, None if it sets no limit below ``memory``.
        features: Those of :data:`FEATURES` that it has.
    """

    name: str
    machine: str
    cores: int
    quota: float | None
    memory: int
    memory_limit: int | None
    features: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine and its Python.

    Attributes:
        system: Kernel and distribution.
        python: Version.
        environment: Folder of the virtual environment, "" outside of one.
        petseg: Version.
        packages: Versions of what petseg stands on, of what is installed.
        cpu: The processor.
        nvidia_driver: Version of the kernel's NVIDIA driver ("580.95.05"), "" without one.
    """

    system: str
    python: str
    environment: str
    petseg: str
    packages: dict[str, str]
    cpu: Cpu
    nvidia_driver: str


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU, as its driver describes it.

    Attributes:
        index: As CUDA counts.
        name: Of the product.
        compute_capability: "8.9".
        memory: Bytes.
        driver: The newest CUDA that the driver can run ("CUDA 13.0").
    """

    index: int
    name: str
    compute_capability: str
    memory: int
    driver: str


def identity() -> str:
    """What tells this installation of a system from all others; "" if the system does not say.

    A digest of systemd's machine ID, which is not to be given away itself (man 5 machine-id).
    """
    known = _text("/etc/machine-id").strip()
    return hashlib.sha256(f"petseg {known}".encode()).hexdigest()[:32] if known else ""


def host() -> Host:
    """What this machine is; loads no driver and no engine."""
    return Host(
        system=f"{platform.system()} {platform.release()}{_distribution()}",
        python=platform.python_version(),
        environment=sys.prefix if sys.prefix != sys.base_prefix else "",
        petseg=__version__,
        packages=versions(PACKAGES),
        cpu=_cpu(),
        nvidia_driver=_nvidia_driver(_text("/proc/driver/nvidia/version")),
    )


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _distribution() -> str:
    try:
        return f", {platform.freedesktop_os_release()['PRETTY_NAME']}"
    except (OSError, KeyError):
        return ""


def _nvidia_driver(text: str) -> str:
    """The version, from what the kernel's module says ("NVRM version: NVIDIA UNIX ...  580.95.05  Release Build")."""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return found[1] if found else ""


def cores() -> int:
    """How many cores the scheduler may put this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus() -> int:
    """CPUs this process may use: those it may run on, or those whose time a container's quota allows, rounded up."""
    quota, _ = limits()
    return cores() if quota is None else max(1, min(cores(), math.ceil(quota)))


def features() -> tuple[str, ...]:
    """Those of :data:`FEATURES` that the processor has; none where the kernel does not say."""
    return parse_cpuinfo(_text("/proc/cpuinfo"))[1]


def _cpu() -> Cpu:
    name, has = parse_cpuinfo(_text("/proc/cpuinfo"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    quota, limit = limits()
    board = _text("/proc/device-tree/model").rstrip("\0")
    return Cpu(
        name=", ".join(filter(None, (name or platform.processor(), board))) or "unknown",
        machine=platform.machine(),
        cores=cores(),
        quota=quota,
        memory=memory,
        memory_limit=limit if limit is not None and limit < memory else None,
        features=has,
    )


def _text(path: str) -> str:
    """A file of the kernel's; "" where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Name ("" if it says none) and those of :data:`FEATURES`, of the text of ``/proc/cpuinfo``.

    Of processors with cores of two kinds, the names of both, and the features that all cores have.
    """
    fields: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), []).append(value.strip())
    names = fields.get("model name") or [
        _ARM.get(part, f"ARM part {part}") if maker == "0x41" else f"implementer {maker}, part {part}"
        for maker, part in zip(fields.get("CPU implementer", []), fields.get("CPU part", []), strict=False)
    ]
    flags = [set(value.split()) for value in fields.get("flags", fields.get("Features", []))]
    everywhere = set.intersection(*flags) if flags else set()
    return " + ".join(dict.fromkeys(names)), tuple(feature for feature in FEATURES if feature in everywhere)


def temperatures(root: Path = Path("/sys/class/thermal")) -> dict[str, float]:
    """How warm the kernel's thermal zones are now, in degrees Celsius by their type ("cpu-thermal", "x86_pkg_temp").

    Of several zones of one type the warmest; of a machine that shows none, as virtual ones do, nothing.
    """
    zones: dict[str, float] = {}
    for zone in root.glob("thermal_zone*"):
        with contextlib.suppress(ValueError):  # "": a sensor that is switched off
            kind, degrees = _text(f"{zone}/type").strip() or zone.name, int(_text(f"{zone}/temp")) / 1000
            zones[kind] = max(degrees, zones.get(kind, degrees))
    return dict(sorted(zones.items()))


def frequencies(root: Path = Path("/sys/devices/system/cpu")) -> tuple[float, ...]:
    """How fast each core runs now, in MHz, in the order of their numbers; nothing where the kernel does not say."""
    cores = {int(core.name[3:]): _text(f"{core}/cpufreq/scaling_cur_freq").strip() for core in root.glob("cpu[0-9]*")}
    return tuple(int(khz) / 1000 for _, khz in sorted(cores.items()) if khz.isdecimal())


def give_back_memory() -> None:
    """Give the system what glibc keeps of freed memory: some 64 MB for each thread that worked on large pictures."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def limits() -> tuple[float | None, int | None]:
    """:func:`cgroup_limits` of this process, as they were when it was first asked."""
    return cgroup_limits(_CGROUPS, _text("/proc/self/cgroup"))


def available_memory() -> int:
    """Bytes of memory that this process can take now: of what the machine has left, and its control groups allow."""
    line = re.search(r"^MemAvailable:\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    available = 1024 * int(line[1]) if line else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    left = cgroup_memory_left(_CGROUPS, _text("/proc/self/cgroup"))
    return available if left is None else min(available, left)


def cgroup_limits(root: Path, membership: str) -> tuple[float | None, int | None]:
    """What the control groups of this process allow: CPUs' worth of time, and bytes of memory; None: no limit.

    A limit holds for all groups inside, so the lowest on the way up counts. Version 1 is what older boards run.

    Args:
        root: Where control groups are mounted.
        membership: The text of ``/proc/self/cgroup``.
    """
    cpus: list[float] = []
    for folder in _groups(root, membership, "cpu"):
        # Version 2: "QUOTA PERIOD" in microseconds; version 1: one file each. No limit is "max", and -1.
        words = _text(f"{folder}/cpu.max").split() or [
            *_text(f"{folder}/cpu.cfs_quota_us").split(),
            *_text(f"{folder}/cpu.cfs_period_us").split(),
        ]
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            cpus.append(int(words[0]) / int(words[1]))
    memory = [limit for folder in _groups(root, membership, "memory") if (limit := _memory_limit(folder)) is not None]
    return min(cpus, default=None), min(memory, default=None)


def cgroup_memory_left(root: Path, membership: str) -> int | None:
    """Bytes of memory that the control groups of this process have left, of the one that has the least; None: no limit.

    What a group uses counts without the files' contents that the kernel drops as soon as memory is wanted.

    Args:
        root: As for :func:`cgroup_limits`.
        membership: Likewise.
    """
    left = (
        max(0, limit - _memory_used(folder))
        for folder in _groups(root, membership, "memory")
        if (limit := _memory_limit(folder)) is not None
    )
    return min(left, default=None)


def _memory_limit(folder: Path) -> int | None:
    """Of one control group, in bytes."""
    word = _text(f"{folder}/memory.max").strip() or _text(f"{folder}/memory.limit_in_bytes").strip()
    # Version 1 says "no limit" with a number near 2**63.
    return int(word) if word.isdecimal() and int(word) < 2**60 else None


def _memory_used(folder: Path) -> int:
    """Of one control group and those in it, in bytes, without files' contents that were not used lately."""
    used = _text(f"{folder}/memory.current").strip() or _text(f"{folder}/memory.usage_in_bytes").strip()
    if not used.isdecimal():
        return 0
    statistics = dict(line.split(" ", 1) for line in _text(f"{folder}/memory.stat").splitlines() if " " in line)
    # In version 1 the plain number is that of the group alone, without those in it.
    files = statistics.get("total_inactive_file") or statistics.get("inactive_file") or "0"
    return int(used) - (int(files) if files.isdecimal() else 0)


def _groups(root: Path, membership: str, controller: str) -> Iterator[Path]:
    """The folders of this process's groups and all around them, as far as they can be seen from here."""
    for line in membership.splitlines():
        _, names, path = line.split(":", 2)
        if names == "" or controller in names.split(","):
            mount = root / controller if names else root
            inner = mount / path.strip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount))


def nvidia_gpus() -> int:
    """How many NVIDIA GPUs the driver shows to this process; 0 without a driver. Needs no CUDA toolkit."""
    return len(gpus())


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that the driver shows to this process; none without a driver. Needs no CUDA toolkit."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


def old_driver(driver: str, packages: str) -> str:
    """What to do about a driver that does not run CUDA 13, which pip's packages are for unless others are asked for.

    Args:
        driver: As in :class:`Gpu`.
        packages: What to install, with pip, for CUDA 12.

    Returns:
        "" if the driver runs CUDA 13, or is not known.
    """
    found = re.match(r"CUDA (\d+)\.", driver)
    major = int(found[1]) if found else 0
    if not 0 < major < 13:
        return ""
    update = f"the driver is for {driver}, and what pip installs by itself for CUDA 13: update it to 580 or newer"
    builds = f", or install builds for CUDA 12 beside petseg in a new environment: pip install {packages}"
    return update + (builds if major == 12 else "")


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    """What the driver says of one GPU; what it does not say is "unknown", or 0."""
    device, major, minor, version = (ctypes.c_int(0) for _ in range(4))
    memory, name = ctypes.c_size_t(0), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
    driver.cuDriverGetVersion(ctypes.byref(version))
    return Gpu(
        index=index,
        name=name.value.decode(errors="replace") or "unknown",
        compute_capability=f"{major.value}.{minor.value}",
        memory=memory.value,
        driver=f"CUDA {version.value // 1000}.{version.value % 1000 // 10}",
    )
