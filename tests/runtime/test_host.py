"""Facts about the machine come from its kernel and driver; missing ones are empty values, not errors."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from petseg_runtime import __version__, host
from petseg_runtime.host import (
    Gpu,
    cgroup_limits,
    cgroup_memory_left,
    driver_trouble,
    gpus,
    no_gpu,
    nvidia_gpus,
    parse_cpuinfo,
    versions,
)

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

X86 = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8
bugs\t\t: spectre_v1

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 avx512_fp16 amx_tile amx_int8
"""

RASPBERRY_PI_5 = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""

BIG_LITTLE = """\
processor\t: 0
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 4
Features\t: fp asimd asimddp i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xfff

processor\t: 5
Features\t: fp asimd asimddp i8mm bf16
CPU implementer\t: 0x61
CPU part\t: 0x022
"""


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        (
            X86,
            "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
            "avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16",
        ),
        (RASPBERRY_PI_5, "Cortex-A76", "asimd asimddp fphp asimdhp"),
        (BIG_LITTLE, "Cortex-A55 + ARM part 0xfff + implementer 0x61, part 0x022", "asimd asimddp"),
        ("processor\t: 0\nhart\t: 0\nisa\t: rv64imafdc\n", "", ""),
        ("", "", ""),
    ],
    ids=["x86", "Raspberry Pi", "two kinds of cores", "RISC-V", "nothing"],
)
def test_processors_are_described_from_the_kernels_data(text: str, name: str, features: str) -> None:
    assert parse_cpuinfo(text) == (name, tuple(features.split()))


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_available_memory_is_the_minimum_of_machine_and_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    left: int | None = None
    monkeypatch.setattr(host, "cgroup_memory_left", lambda root, membership: left)
    assert 2**26 < host.available_memory() <= host.host().cpu.memory
    left = 2**26
    assert host.available_memory() == 2**26
    monkeypatch.setattr(host, "_text", lambda path: "MemTotal: 8 kB\nMemAvailable:    4 kB\n")
    assert host.available_memory() == 4096
    left = None
    monkeypatch.setattr(host, "_text", lambda path: "")
    assert host.available_memory() == host.os.sysconf("SC_PAGE_SIZE") * host.os.sysconf("SC_PHYS_PAGES")


def test_memory_used_by_a_cgroup_v2_is_not_available(tmp_path: Path) -> None:
    statistics = "anon 500\nfile 300\ninactive_file 250\nactive_file 50"
    group(tmp_path / "user", memory__max="1000", memory__current="900", memory__stat=statistics)
    assert cgroup_memory_left(tmp_path, "0::/user\n") == 1000 - (900 - 250)


def test_memory_used_by_a_cgroup_v1_is_not_available(tmp_path: Path) -> None:
    statistics = "inactive_file 10\ntotal_inactive_file 250\ntotal_active_file 50"
    folder = tmp_path / "memory" / "docker"
    group(folder, memory__limit_in_bytes="1000", memory__usage_in_bytes="900", memory__stat=statistics)
    assert cgroup_memory_left(tmp_path, "1:memory:/docker\n") == 1000 - (900 - 250)


def test_the_cgroup_with_the_least_available_memory_counts(tmp_path: Path) -> None:
    group(tmp_path / "outer", memory__max="2000", memory__current="1900")
    group(tmp_path / "outer" / "inner", memory__max="1000", memory__current="100", memory__stat="inactive_file 50")
    assert cgroup_memory_left(tmp_path, "0::/outer/inner\n") == 100


def test_a_cgroup_over_its_limit_has_no_memory_available(tmp_path: Path) -> None:
    group(tmp_path, memory__max="1000", memory__current="1100")
    assert cgroup_memory_left(tmp_path, "0::/\n") == 0
    (tmp_path / "memory.current").unlink()
    assert cgroup_memory_left(tmp_path, "0::/\n") == 1000
    group(tmp_path, memory__max="max")
    assert cgroup_memory_left(tmp_path, "0::/\n") is None


def test_without_a_cgroup_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path, "") == (None, None)
    assert cgroup_limits(tmp_path, "0::/\n") == (None, None)


def test_a_cgroup_v2_container_has_its_limits_at_the_root(tmp_path: Path) -> None:
    group(tmp_path, cpu__max="150000 100000", memory__max="536870912")
    assert cgroup_limits(tmp_path, "0::/\n") == (1.5, 536870912)


def test_the_lowest_limit_of_all_ancestors_applies(tmp_path: Path) -> None:
    group(tmp_path / "user", cpu__max="100000 100000", memory__max="4096")
    group(tmp_path / "user" / "session", cpu__max="max 100000", memory__max="8192")
    group(tmp_path / "other", cpu__max="10000 100000", memory__max="1024")
    assert cgroup_limits(tmp_path, "0::/user/session\n") == (1.0, 4096)


def test_unlimited_cgroups_of_both_versions_are_recognised(tmp_path: Path) -> None:
    group(tmp_path, cpu__max="max 100000", memory__max="max")
    group(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    group(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712")
    assert cgroup_limits(tmp_path, "0::/\n2:cpu,cpuacct:/\n1:memory:/\n") == (None, None)


def test_cgroup_v1_has_a_folder_per_controller(tmp_path: Path) -> None:
    group(tmp_path / "cpu" / "docker" / "c0ffee", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    group(tmp_path / "memory", memory__limit_in_bytes="1048576")  # a namespace shows its own group as the root
    membership = "3:cpuset:/x\n2:cpu,cpuacct:/docker/c0ffee\n1:memory:/docker/c0ffee\n"
    assert cgroup_limits(tmp_path, membership) == (0.5, 1048576)


def test_a_cgroup_path_does_not_escape_the_mount(tmp_path: Path) -> None:
    group(tmp_path, cpu__max="1000 100000")
    (tmp_path / "mount").mkdir()
    assert cgroup_limits(tmp_path / "mount", "0::/a/b\n") == (None, None)


def test_thermal_zones_are_named_by_type(tmp_path: Path) -> None:
    assert host.temperatures(tmp_path / "none") == {}
    group(tmp_path / "thermal_zone0", type="gpu-thermal", temp="58500")
    group(tmp_path / "thermal_zone1", type="cpu-thermal", temp="61250")
    group(tmp_path / "thermal_zone2", type="cpu-thermal", temp="60000")
    group(tmp_path / "thermal_zone3", type="outside", temp="-5000")
    group(tmp_path / "thermal_zone4", type="switched off")
    group(tmp_path / "thermal_zone5", temp="40000")
    group(tmp_path / "cooling_device0", type="fan")
    expected = {"cpu-thermal": 61.25, "gpu-thermal": 58.5, "outside": -5.0, "thermal_zone5": 40.0}
    assert host.temperatures(tmp_path) == expected
    assert list(host.temperatures(tmp_path)) == sorted(expected)


def test_core_frequencies_are_in_core_order(tmp_path: Path) -> None:
    assert host.frequencies(tmp_path / "none") == ()
    for core, khz in ((10, "1000000"), (2, "1800000"), (0, "600000")):
        group(tmp_path / f"cpu{core}" / "cpufreq", scaling_cur_freq=khz)
    group(tmp_path / "cpu1" / "cpufreq", scaling_cur_freq="<unknown>")
    group(tmp_path / "cpu3", online="0")
    group(tmp_path / "cpufreq", scaling_cur_freq="7")
    assert host.frequencies(tmp_path) == (600.0, 1800.0, 1000.0)


def test_the_driver_version_is_parsed_from_its_module() -> None:
    text = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)  Tue\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14+deb12u1)\n"
    )
    assert host._nvidia_driver(text) == "580.95.05"
    assert host._nvidia_driver(text.replace("580.95.05", "535.183")) == "535.183"
    assert host._nvidia_driver("") == ""


def test_host_facts_are_available_on_this_machine() -> None:
    here = host.host()
    assert here.petseg == __version__
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    assert here.environment == (sys.prefix if sys.prefix != sys.base_prefix else "")
    assert {"numpy", "pillow", "av"} <= set(here.packages)
    assert here.system.startswith(os.uname().sysname)
    cpu = here.cpu
    assert cpu.name
    assert 1 <= cpu.cores <= (os.cpu_count() or 1)
    assert cpu.memory > 2**28
    assert cpu.quota is None or cpu.quota > 0
    assert cpu.memory_limit is None or 0 < cpu.memory_limit < cpu.memory
    assert set(cpu.features) <= set(host.FEATURES)
    assert nvidia_gpus() >= 0


def test_versions_are_those_of_the_installed_packages() -> None:
    assert versions(["click", "no-such-package"]).keys() == {"click"}


def test_the_host_report_needs_only_python() -> None:
    """`make gpu-check` calls it before anything is installed."""
    program = "import sys; from petseg_runtime import host; host.host(); host.gpus(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    modules = {name.partition(".")[0] for name in done.stdout.split()}
    assert "petseg_runtime" in modules
    assert modules & {"numpy", "PIL", "av", "click", "platformdirs", "onnxruntime", "openvino"} == set()


class Driver:
    """The functions of libcuda that are called."""

    def __init__(self, init: int = 0, status: int = 0, count: int = 2) -> None:
        self.init, self.status, self.count = init, status, count

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return self.status

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = f"NVIDIA RTX {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = 24 * 2**30
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12080
        return 0

    def cuGetErrorName(self, code: int, name: Any) -> int:
        name._obj.value = {3: b"CUDA_ERROR_NOT_INITIALIZED", 999: b"CUDA_ERROR_UNKNOWN"}.get(code)
        return 0 if name._obj.value else 1


@pytest.fixture(autouse=True)
def uncached() -> Iterator[None]:
    """The driver's answer is cached forever, so clear the cache."""
    host._driver.cache_clear()
    yield
    host._driver.cache_clear()


@pytest.mark.parametrize(
    ("driver", "count"),
    [
        (Driver(), 2),
        (Driver(count=0), 0),
        (Driver(init=100), 0),  # CUDA_ERROR_NO_DEVICE
        (Driver(status=100), 0),
    ],
)
def test_the_number_of_gpus_comes_from_the_driver(driver: Driver, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert (nvidia_gpus(), driver_trouble()) == (count, "")
    assert no_gpu() == "this machine shows no NVIDIA GPU: install its driver"


@pytest.mark.parametrize(
    ("driver", "failed", "remedy"),
    [
        (Driver(init=999), "cuInit: 999 CUDA_ERROR_UNKNOWN", "reboot, or after a suspend, reload"),
        (Driver(init=803), "cuInit: 803", "reboot, because its library and its kernel module have different versions"),
        (Driver(init=804), "cuInit: 804", "remove the package cuda-compat"),
        (Driver(init=802), "cuInit: 802", "start NVIDIA's fabric manager"),
        (Driver(status=3), "cuDeviceGetCount: 3 CUDA_ERROR_NOT_INITIALIZED", "reboot, or install it again"),
    ],
)
def test_a_driver_that_does_not_start_is_not_taken_for_a_missing_one(
    driver: Driver, failed: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert nvidia_gpus() == 0
    assert driver_trouble().startswith(f"NVIDIA's driver is installed but does not start ({failed}): {remedy}")
    assert no_gpu() == driver_trouble()


def test_the_error_codes_with_remedies_are_those_of_cuda() -> None:
    codes = pytest.importorskip("cuda.bindings.driver").CUresult
    assert codes.CUDA_ERROR_NO_DEVICE == host._NO_DEVICE
    assert {codes(code).name.removeprefix("CUDA_ERROR_") for code in host._REMEDIES} == {
        "SYSTEM_NOT_READY",
        "SYSTEM_DRIVER_MISMATCH",
        "COMPAT_NOT_SUPPORTED_ON_DEVICE",
        "UNKNOWN",
    }


def test_the_gpu_descriptions_come_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    expected = Gpu(index=1, name="NVIDIA RTX 1", compute_capability="8.9", memory=24 * 2**30, driver="CUDA 12.8")
    assert gpus()[1] == expected


@pytest.mark.parametrize(
    ("driver", "update", "builds"),
    [
        ("CUDA 11.4", True, False),
        ("CUDA 12.9", True, True),
        ("CUDA 13.0", False, False),
        ("CUDA 0.0", False, False),
        ("unknown", False, False),
    ],
)
def test_an_old_driver_gets_two_remedies(
    driver: str, update: bool, builds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    remedy = host.old_driver(driver, "abacus-cu12")
    assert ("update it to 580 or newer" in remedy, "pip install abacus-cu12" in remedy) == (update, builds)
    assert update or remedy == ""


def test_on_arm64_an_old_driver_gets_the_only_packages_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    remedy = host.old_driver("CUDA 12.4", host.ONNXRUNTIME_CUDA12)
    assert remedy.endswith(
        "update it to 580 or newer, or install TensorRT for CUDA 12 beside petseg in a new environment: pip install "
        "tensorrt-cu12 'cuda-bindings<13'"
    )


@pytest.mark.parametrize(("driver", "container"), [("CUDA 11.4", False), ("CUDA 12.6", True)])
def test_on_a_jetson_an_old_driver_belongs_to_jetpack(
    driver: str, container: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "jetson", lambda: True)
    remedy = host.old_driver(driver, "abacus-cu12")
    assert remedy.startswith(f"the driver is for {driver}, that of an earlier JetPack than 7: update JetPack")
    assert ("a container with Python 3.11 or newer and TensorRT 10.9" in remedy) is container
    assert not {"580", "abacus-cu12"} & {*remedy.split()}


def test_a_jetson_is_known_by_its_kernel_or_its_release_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-51-generic")
    assert host.jetson() is Path("/etc/nv_tegra_release").exists()
    monkeypatch.setattr(platform, "release", lambda: "6.8.12-tegra")
    assert host.jetson()


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert (nvidia_gpus(), driver_trouble()) == (0, "")


FREED = """
import ctypes, os
from petseg_runtime import host

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [c.malloc(100_000) for _ in range(500)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
    c.free(block)
before = resident()
host.give_back_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_freed_memory_is_returned_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=200, check=True)
    assert int(done.stdout) > 40_000_000


def test_malloc_trim_is_not_called_on_c_libraries_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # like musl, which has no malloc_trim
    host.give_back_memory()


@pytest.mark.parametrize("extra", ["cpu", "gpu", "openvino", "trt", "rtx"])
def test_every_engines_packages_are_tracked_as_mask_packages(extra: str) -> None:
    """A verification depends on their versions: if one were missing from the list, it would stay valid forever."""
    needed = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"][extra]
    packages = {re.split(r"[^\w-]", line)[0] for line in needed} - {"cuda-bindings"}
    assert packages
    # NVIDIA's packages only name the one with the library, which can be installed or replaced by itself.
    packages |= {f"{name}-cu{major}" for name in packages if name.startswith("tensorrt") for major in (12, 13)}
    assert packages <= {*host.MASK_PACKAGES}
    assert {*host.MASK_PACKAGES} <= {*host.PACKAGES}


@pytest.mark.parametrize(("quota", "cpus"), [(None, 8), (0.5, 1), (2.0, 2), (2.5, 3), (64.0, 8), (0.0, 1)])
def test_no_more_cpus_are_used_than_the_containers_quota(
    quota: float | None, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(host, "limits", lambda: (quota, None))
    assert host.usable_cpus() == cpus
