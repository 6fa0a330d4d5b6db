"""What this machine has, and how much of it this process may use; needs only the standard library."""

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
    "JETSON_TENSORRT",
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
    "driver_trouble",
    "features",
    "frequencies",
    "give_back_memory",
    "gpus",
    "host",
    "identity",
    "jetson",
    "limits",
    "no_gpu",
    "nvidia_gpus",
    "old_driver",
    "parse_cpuinfo",
    "temperatures",
    "usable_cpus",
    "versions",
]

#: Seconds after which long waits in the main thread wake up and wait again. A signal that arrives just as Python's main
#: thread begins to wait for another thread does not wake it, so without a timeout its handler would wait, too.
LOOK_UP: Final = 0.5

# CPU features that inference engines have special code for, as Linux spells them: x86-64, then ARM.
FEATURES: Final = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)

#: Linux reports ARM processors (implementer 0x41) by number, not by name; common ones, from util-linux's lscpu.
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

#: Packages that may change masks from one version to the next: the one that reads photos, and all engines.
MASK_PACKAGES: Final = (
    *("pillow", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
)
#: All packages whose versions are recorded with results.
PACKAGES: Final = ("numpy", *MASK_PACKAGES, "av", "cuda-bindings")

#: ONNX Runtime for CUDA 12 with its libraries; from 1.27 on, the published packages are for CUDA 13.
ONNXRUNTIME_CUDA12: Final = "'onnxruntime-gpu[cuda,cudnn]<1.27'"

#: TensorRT for CUDA 12: for arm64, the other engines have no packages for CUDA 12.
_CUDA12_ARM64: Final = "tensorrt-cu12 'cuda-bindings<13'"

#: For a Jetson with JetPack 6 or earlier, whose Python is too old for petseg.
_JETSON_CONTAINER: Final = (
    "use a container with Python 3.11 or newer and TensorRT 10.9 or newer for CUDA 12, and in it, pip install "
    "'cuda-bindings<13'"
)
#: What to install on a Jetson so that an engine uses its GPU; pip's packages are for other machines.
JETSON_TENSORRT: Final = (
    "on a Jetson, use JetPack's own TensorRT: apt install python3-libnvinfer, and in an environment made with "
    f"--system-site-packages, pip install cuda-bindings; before JetPack 7, {_JETSON_CONTAINER}"
)

#: CUDA's error code for a driver that works, but shows no GPU to this process.
_NO_DEVICE: Final = 100
#: What to do if NVIDIA's driver does not start, by CUDA's error code.
_REMEDIES: Final = {
    802: "start NVIDIA's fabric manager (systemctl start nvidia-fabricmanager)",
    803: "reboot, because its library and its kernel module have different versions, as after an update",
    804: "remove the package cuda-compat, whose library does not support this GPU",
    999: "reboot, or after a suspend, reload its kernel module (rmmod nvidia_uvm; modprobe nvidia_uvm)",
}


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The processor, and how much of it and of the memory this process may use.

    Attributes:
        name: Name reported by the kernel; "unknown" if it reports none.
        machine: The architecture ("x86_64", "aarch64").
        cores: Cores on which this process may run.
        quota: CPU time that the control group allows, in CPUs; None if it sets no limit.
        memory: Memory of the machine, in bytes.
        memory_limit: Limit of the control group, in bytes; None if it sets no limit below ``memory``.
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
        python: Version of Python.
        environment: Folder of the virtual environment; "" outside of one.
        petseg: Version of petseg.
        packages: Versions of those of :data:`PACKAGES` that are installed.
        cpu: The processor.
        nvidia_driver: Version of the kernel's NVIDIA driver ("580.95.05"); "" without one.
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
        index: CUDA's index of the device.
        name: Product name.
        compute_capability: For example "8.9".
        memory: Memory in bytes.
        driver: The newest version of CUDA that the driver supports ("CUDA 13.0").
    """

    index: int
    name: str
    compute_capability: str
    memory: int
    driver: str


def identity() -> str:
    """Returns an identifier of this installation of the operating system; "" if the system has none.

    It is a digest of systemd's machine ID, which must not be disclosed itself (man 5 machine-id).
    """
    known = _text("/etc/machine-id").strip()
    return hashlib.sha256(f"petseg {known}".encode()).hexdigest()[:32] if known else ""


def host() -> Host:
    """Returns a description of this machine; loads no driver and no engine."""
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
    """Returns the versions of those packages that are installed."""
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
    """Parses the version from the kernel module's text ("NVRM version: NVIDIA UNIX ...  580.95.05  Release Build")."""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return found[1] if found else ""


def cores() -> int:
    """Returns the number of cores on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus() -> int:
    """Returns the number of CPUs this process may use: its cores, or the container's quota (rounded up) if lower."""
    quota, _ = limits()
    return cores() if quota is None else max(1, min(cores(), math.ceil(quota)))


def features() -> tuple[str, ...]:
    """Returns those of :data:`FEATURES` that the processor has; none if the kernel reports none."""
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
    """Returns the text of a system file; "" if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Parses ``/proc/cpuinfo`` into the processor's name ("" if there is none) and those of :data:`FEATURES` it has.

    If its cores are of two types, the name contains both, and the features are those that all cores have.
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
    """Returns the current temperatures of the kernel's thermal zones, in °C by type ("cpu-thermal", "x86_pkg_temp").

    If several zones have the same type, the warmest counts; the result is empty on machines without zones, such as
    virtual ones.
    """
    zones: dict[str, float] = {}
    for zone in root.glob("thermal_zone*"):
        with contextlib.suppress(ValueError):  # int(""): the sensor is switched off
            kind, degrees = _text(f"{zone}/type").strip() or zone.name, int(_text(f"{zone}/temp")) / 1000
            zones[kind] = max(degrees, zones.get(kind, degrees))
    return dict(sorted(zones.items()))


def frequencies(root: Path = Path("/sys/devices/system/cpu")) -> tuple[float, ...]:
    """Returns the current frequency of each core in MHz, in the order of the cores; empty if the kernel has none."""
    cores = {int(core.name[3:]): _text(f"{core}/cpufreq/scaling_cur_freq").strip() for core in root.glob("cpu[0-9]*")}
    return tuple(int(khz) / 1000 for _, khz in sorted(cores.items()) if khz.isdecimal())


def give_back_memory() -> None:
    """Return the freed memory that glibc retains to the system: some 64 MB per thread that processed large pictures."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def limits() -> tuple[float | None, int | None]:
    """Returns :func:`cgroup_limits` of this process, cached at the first call."""
    return cgroup_limits(_CGROUPS, _text("/proc/self/cgroup"))


def available_memory() -> int:
    """Returns the bytes of memory that this process can allocate now, given the machine and its control groups."""
    line = re.search(r"^MemAvailable:\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    available = 1024 * int(line[1]) if line else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    left = cgroup_memory_left(_CGROUPS, _text("/proc/self/cgroup"))
    return available if left is None else min(available, left)


def cgroup_limits(root: Path, membership: str) -> tuple[float | None, int | None]:
    """Returns the CPU time (in CPUs) and the bytes of memory that the process's control groups allow; None: no limit.

    A limit applies to all groups below, so the lowest one of the group and its ancestors counts. Both versions of
    control groups are read; older boards use version 1.

    Args:
        root: Where control groups are mounted.
        membership: The text of ``/proc/self/cgroup``.
    """
    cpus: list[float] = []
    for folder in _groups(root, membership, "cpu"):
        # Version 2: "QUOTA PERIOD" in microseconds; version 1: one file each. No limit: "max" in version 2, -1 in 1.
        words = _text(f"{folder}/cpu.max").split() or [
            *_text(f"{folder}/cpu.cfs_quota_us").split(),
            *_text(f"{folder}/cpu.cfs_period_us").split(),
        ]
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            cpus.append(int(words[0]) / int(words[1]))
    memory = [limit for folder in _groups(root, membership, "memory") if (limit := _memory_limit(folder)) is not None]
    return min(cpus, default=None), min(memory, default=None)


def cgroup_memory_left(root: Path, membership: str) -> int | None:
    """Returns the bytes of memory left in the process's control group that has the least; None: no limit.

    Cached file contents that the kernel drops when memory is needed do not count as used.

    Args:
        root: As for :func:`cgroup_limits`.
        membership: As for :func:`cgroup_limits`.
    """
    left = (
        max(0, limit - _memory_used(folder))
        for folder in _groups(root, membership, "memory")
        if (limit := _memory_limit(folder)) is not None
    )
    return min(left, default=None)


def _memory_limit(folder: Path) -> int | None:
    """Returns the memory limit of one control group in bytes."""
    word = _text(f"{folder}/memory.max").strip() or _text(f"{folder}/memory.limit_in_bytes").strip()
    # Version 1 expresses "no limit" as a number near 2**63.
    return int(word) if word.isdecimal() and int(word) < 2**60 else None


def _memory_used(folder: Path) -> int:
    """Returns the bytes used by one control group and its subgroups, without inactive file cache."""
    used = _text(f"{folder}/memory.current").strip() or _text(f"{folder}/memory.usage_in_bytes").strip()
    if not used.isdecimal():
        return 0
    statistics = dict(line.split(" ", 1) for line in _text(f"{folder}/memory.stat").splitlines() if " " in line)
    # In version 1, the number without "total_" excludes subgroups.
    files = statistics.get("total_inactive_file") or statistics.get("inactive_file") or "0"
    return int(used) - (int(files) if files.isdecimal() else 0)


def _groups(root: Path, membership: str, controller: str) -> Iterator[Path]:
    """Yields the folders of this process's groups and of their ancestors below the mount point."""
    for line in membership.splitlines():
        _, names, path = line.split(":", 2)
        if names == "" or controller in names.split(","):
            mount = root / controller if names else root
            inner = mount / path.strip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount))


def nvidia_gpus() -> int:
    """Returns the number of NVIDIA GPUs that the driver shows to this process; 0 without a driver that works."""
    return len(gpus())


def gpus() -> tuple[Gpu, ...]:
    """Returns the NVIDIA GPUs that the driver shows to this process; none without a driver that works.

    Needs no CUDA toolkit.
    """
    return _driver()[0]


def driver_trouble() -> str:
    """Returns why NVIDIA's driver, which is installed, does not start, and what to do about it; "" otherwise."""
    return _driver()[1]


def no_gpu() -> str:
    """Returns why this process has no NVIDIA GPU, and what to do about it."""
    return driver_trouble() or "this machine shows no NVIDIA GPU: install its driver"


@functools.cache
def _driver() -> tuple[tuple[Gpu, ...], str]:
    """Returns what :func:`gpus` and :func:`driver_trouble` return."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return (), ""
    count = ctypes.c_int(0)
    if code := driver.cuInit(0):
        return (), _trouble(driver, "cuInit", code)
    if code := driver.cuDeviceGetCount(ctypes.byref(count)):
        return (), _trouble(driver, "cuDeviceGetCount", code)
    return tuple(_gpu(driver, index) for index in range(count.value)), ""


def _trouble(driver: ctypes.CDLL, function: str, code: int) -> str:
    """Describes an error of a function with which the driver starts; "" if there is merely no GPU."""
    if code == _NO_DEVICE:
        return ""
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))  # leaves it empty if the driver does not know its own code
    named = f"{code} {(name.value or b'').decode()}".rstrip()
    remedy = _REMEDIES.get(code, "reboot, or install it again")
    return f"NVIDIA's driver is installed but does not start ({function}: {named}): {remedy}"


def jetson() -> bool:
    """Returns whether this is an NVIDIA Jetson: its driver and its TensorRT belong to its system, JetPack."""
    return platform.release().endswith("tegra") or Path("/etc/nv_tegra_release").exists()


def old_driver(driver: str, packages: str) -> str:
    """Returns what to do about a driver that is too old for CUDA 13, the version that pip's default packages need.

    Args:
        driver: As in :class:`Gpu`.
        packages: The pip packages for CUDA 12, on x86-64.

    Returns:
        The remedy; "" if the driver supports CUDA 13, or its version is unknown.
    """
    found = re.match(r"CUDA (\d+)\.", driver)
    major = int(found[1]) if found else 0
    if not 0 < major < 13:
        return ""
    if jetson():
        update = f"the driver is for {driver}, that of an earlier JetPack than 7: update JetPack"
        builds = _JETSON_CONTAINER
    else:
        update = f"the driver is for {driver}, but pip's default packages are for CUDA 13: update it to 580 or newer"
        if platform.machine() == "aarch64":
            builds = f"install TensorRT for CUDA 12 beside petseg in a new environment: pip install {_CUDA12_ARM64}"
        else:
            builds = f"install builds for CUDA 12 beside petseg in a new environment: pip install {packages}"
    return f"{update}, or {builds}" if major == 12 else update


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    """Returns the driver's description of one GPU; missing values are "unknown" or 0."""
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
