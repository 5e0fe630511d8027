"""Chip files are sourced and consistent; the CPU of any machine can be described; `auto` finds what is there."""

import dataclasses
import re
import sys
import tomllib
from types import SimpleNamespace

import pytest

from klab.harness.catalog import chips as chips_module
from klab.harness.catalog import find_chip, load_chips
from klab.harness.catalog.chips import chip_of_device
from klab.harness.catalog.cpu import chip_of, detect_cpu, flops_per_cycle
from klab.harness.catalog.cpu_probe import PROBES, CpuFacts, best_copy, copy_gb_per_s, probe
from klab.harness.catalog.models import PROFILES
from klab.kernels.errors import CannotMeasure, UsageError

H200 = (PROFILES / "chips" / "h200.toml").read_text()


@pytest.mark.parametrize("chip", load_chips(), ids=lambda chip: chip.name)
def test_every_figure_has_a_source(chip):
    data = tomllib.loads((PROFILES / "chips" / f"{chip.name}.toml").read_text())
    figures = {key for key, value in data.items() if isinstance(value, int | float)} | {
        f"peak_tflops.{dtype}" for dtype in data["peak_tflops"]
    }
    assert figures | {"compute_capability"} == set(data["sources"])
    assert all(chip.provenance[figure] == data["sources"][figure] for figure in figures)


@pytest.mark.parametrize("chip", load_chips(), ids=lambda chip: chip.name)
def test_peaks_follow_from_units_and_clock(chip):
    per_clock = {90: 4096, 100: 8192}[chip.target]
    assert chip.peak_tflops["bfloat16"] * 1e12 == pytest.approx(chip.sm_count * per_clock * chip.spec_clock_mhz * 1e6, rel=1e-3)
    assert chip.peak_tflops["tensorfloat32"] == pytest.approx(chip.peak_tflops["bfloat16"] / 2)
    assert chip.peak_tflops["float8_e4m3fn"] == pytest.approx(chip.peak_tflops["bfloat16"] * 2, rel=1e-3)
    assert chip.peak_tflops["float32"] * 1e12 == pytest.approx(chip.sm_count * 128 * 2 * 1980e6, rel=2e-3)
    assert chip.smem_per_block_bytes == chip.smem_per_sm_bytes - 1024


def test_the_three_chips():
    found = {chip.name: chip for chip in load_chips()}
    assert set(found) == {"h100", "h200", "b200"}
    assert [found[n].memory_gb_per_s for n in ("h100", "h200", "b200")] == [3350, 4800, 7700]
    assert [found[n].sm_count for n in ("h100", "h200", "b200")] == [132, 132, 148]
    assert [found[n].tdp_w for n in ("h100", "h200", "b200")] == [700, 700, 1000]
    assert [found[n].link_gb_per_s for n in ("h100", "h200", "b200")] == [450, 450, 900]
    assert "float4_e2m1" not in found["h200"].peak_tflops and found["b200"].peak_tflops["float4_e2m1"] == 9000
    assert (found["h200"].arch, found["b200"].arch) == ("sm_90a", "sm_100a")


def test_names_and_files(tmp_path):
    assert find_chip("H200") == find_chip("h200")
    path = tmp_path / "mine.toml"
    path.write_text(H200.replace('"h200"', '"Mine"').replace("sm_count = 132", "sm_count = 99"))
    assert (find_chip(str(path)).name, find_chip(str(path)).sm_count) == ("mine", 99)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("sm_count = 132\n", "", "lacks sm_count"),
        ("sm_count = 132", "sm_count = 0", "sm_count is 0"),
        ("sm_count = 132", 'sm_count = "many"', "sm_count is 'many'"),
        ("sm_count = 132", "sm_count =", "not TOML.*line"),
        ("tdp_w = 700", "tdpw = 700", "unknown field tdpw"),
        ("bfloat16 = 989.4", "bfloat16 = nan", "peak_tflops.bfloat16 is nan"),
        ("int8 = 1978.9", "int9 = 1978.9", "int9"),
        ("compute_capability = [9, 0]", "compute_capability = 9", "compute_capability"),
        ('kind = "cuda"', 'kind = "tpu"', "kind is cuda or cpu"),
    ],
)
def test_a_broken_chip_file_is_named_with_what_is_wrong(tmp_path, old, new, says):
    path = tmp_path / "broken.toml"
    assert H200.count(old) >= 1
    path.write_text(H200.replace(old, new, 1))
    with pytest.raises(UsageError, match=says) as caught:
        find_chip(str(path))
    assert "broken.toml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "says"), [("h20", "did you mean h200"), ("tpu-v5", "known: b200"), ("absent.toml", "cannot read")])
def test_an_unknown_chip_gets_help(name, says):
    with pytest.raises(UsageError, match=says):
        find_chip(name)


def fake_torch(monkeypatch, device):
    cuda = SimpleNamespace(is_available=lambda: device is not None, get_device_name=lambda index: device)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_auto(monkeypatch):
    fake_torch(monkeypatch, "NVIDIA H200")
    assert find_chip("auto").name == "h200"
    fake_torch(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert find_chip("auto").name == "h100"
    fake_torch(monkeypatch, None)
    assert find_chip("auto").name == "cpu"
    monkeypatch.setitem(sys.modules, "torch", None)  # what an absent package looks like to an import
    assert find_chip("auto").name == "cpu"
    fake_torch(monkeypatch, "NVIDIA L4")
    with pytest.raises(CannotMeasure, match=r"NVIDIA L4.*h200\.toml.*--chip") as caught:
        find_chip("auto")
    assert caught.value.exit_code == 4


def test_look_alikes_are_not_taken_for_the_chip():
    assert chip_of_device("nvidia b200").name == "b200"
    for other in ("NVIDIA GH200 480GB", "NVIDIA H200 NVL", "NVIDIA H100 PCIe", "NVIDIA GB200", "NVIDIA B300 SXM6 AC"):
        assert chip_of_device(other) is None


# --- the CPU


def machine(tmp_path, *, cpuinfo="", cpus=(), quota=None, memory=None, frequency=None):
    """A /proc and /sys of another machine. `cpus` are (number, core, last-level cache list, KiB)."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    if memory:
        (tmp_path / "proc/meminfo").write_text(f"MemTotal:       {memory} kB\nMemFree: 1 kB\n")
    for number, core, shared, kib in cpus:
        cpu = tmp_path / f"sys/devices/system/cpu/cpu{number}"
        for folder, values in (
            ("topology", {"core_id": core, "physical_package_id": 0}),
            ("cache/index0", {"level": 1, "type": "Data", "size": "32K", "shared_cpu_list": number}),
            ("cache/index3", {"level": 3, "type": "Unified", "size": f"{kib}K", "shared_cpu_list": shared}),
        ):
            (cpu / folder).mkdir(parents=True)
            for name, value in values.items():
                (cpu / folder / name).write_text(f"{value}\n")
    if frequency:
        (tmp_path / "sys/devices/system/cpu/cpu0/cpufreq").mkdir(parents=True)
        (tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").write_text(f"{frequency}\n")
    if quota:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(quota)
    return tmp_path


INTEL = """vendor_id : GenuineIntel
cpu family : 6
model name : Xeon 8480
cpu MHz : 2000.0
flags : fma avx2 avx512f avx512_bf16 amx_bf16 amx_int8 avx512_fp16
"""


def test_hyperthreads_are_one_core_and_caches_are_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr("klab.harness.catalog.cpu_probe._allowed_cpus", lambda: [0, 1, 2, 3])
    cpus = [(0, 0, "0-3", 32768), (1, 1, "0-3", 32768), (2, 0, "0-3", 32768), (3, 1, "0-3", 32768)]
    facts = probe(machine(tmp_path, cpuinfo=INTEL, cpus=cpus, memory=1024, frequency=3800000))
    assert (facts.cores, facts.cache_bytes, facts.clock_mhz, facts.memory_bytes) == (2, 32 << 20, 3800.0, 1 << 20)
    chip = chip_of(facts, measure=False)
    # AVX-512 with two units: 64 FLOP per cycle; AMX: 2048 in bf16.
    assert chip.peak_tflops["float32"] == pytest.approx(2 * 3.8e9 * 64 / 1e12)
    assert chip.peak_tflops["bfloat16"] == pytest.approx(2 * 3.8e9 * 2048 / 1e12)
    assert chip.provenance["peak_tflops.bfloat16"].startswith("modelled: 2 cores x 3800 MHz x 2048")
    assert "guess" in chip.provenance["memory_gb_per_s"]


def test_two_dies_have_two_caches(tmp_path, monkeypatch):
    monkeypatch.setattr("klab.harness.catalog.cpu_probe._allowed_cpus", lambda: [0, 8])
    facts = probe(machine(tmp_path, cpuinfo=INTEL, cpus=[(0, 0, "0-7", 1024), (8, 8, "8-15", 1024)]))
    assert (facts.cores, facts.cache_bytes) == (2, 2 << 20)


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("100000 100000", 1)])
def test_a_containers_quota_counts(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr("klab.harness.catalog.cpu_probe._allowed_cpus", lambda: [0, 1, 2, 3])
    cpus = [(i, i, "0-3", 1024) for i in range(4)]
    assert probe(machine(tmp_path, cpuinfo=INTEL, cpus=cpus, quota=quota)).cores == cores


def test_nothing_known_is_low_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("klab.harness.catalog.cpu_probe._allowed_cpus", lambda: [0, 1])
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    (tmp_path / "proc").mkdir()
    facts = probe(tmp_path)
    assert (facts.cores, facts.cache_bytes, facts.clock_mhz, facts.flags) == (2, None, None, frozenset())
    chip = chip_of(facts, measure=False)
    assert set(chip.peak_tflops) == {"float32"} and chip.peak_tflops["float32"] > 0
    assert all("guess" in chip.provenance[field] for field in ("max_clock_mhz", "l2_bytes", "peak_tflops.float32"))


FACTS = CpuFacts("x", "GenuineIntel", 6, "x86_64", 4, "", frozenset(), 2000.0, "", 1 << 20, 1 << 30)


@pytest.mark.parametrize(
    ("changes", "fp32", "bf16"),
    [
        ({"flags": frozenset({"avx2", "fma"})}, 32, None),
        ({"flags": frozenset({"avx2", "fma", "avx512f"})}, 64, None),
        ({"flags": frozenset({"avx2", "fma", "avx512f", "avx512_bf16"}), "vendor": "AuthenticAMD", "family": 25}, 32, 64),
        ({"flags": frozenset({"avx2", "fma", "avx512f", "avx512_bf16"}), "vendor": "AuthenticAMD", "family": 26}, 64, 128),
        ({"flags": frozenset({"avx"})}, 16, None),
        ({"flags": frozenset({"asimd", "bf16"}), "machine": "aarch64"}, 16, 32),
        ({"machine": "arm64"}, 16, None),
        ({"machine": "mips"}, 4, None),
    ],
)
def test_flops_per_cycle(changes, fp32, bf16):
    rates, _ = flops_per_cycle(dataclasses.replace(FACTS, **changes))
    assert (rates["float32"], rates.get("bfloat16"), rates.get("float16")) == (fp32, bf16, None)


def test_the_bandwidth_is_the_best_of_the_first_few_probes_and_then_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copies = iter([26.0, 55.0, *[30.0] * (PROBES - 2)])
    found = [best_copy(FACTS, 1 << 20, lambda threads, cache: next(copies)) for _ in range(PROBES + 3)]
    assert [gb_per_s for gb_per_s, _ in found] == [26.0] + [55.0] * (PROBES + 2)
    assert found[-1] == (55.0, PROBES)
    other = dataclasses.replace(FACTS, cores=FACTS.cores + 1)
    assert best_copy(other, 1 << 20, lambda threads, cache: 7.0) == (7.0, 1)
    for file in (tmp_path / "cache/klab").iterdir():
        file.write_text('{"gb_per_s": "fast"}')
    assert best_copy(FACTS, 1 << 20, lambda threads, cache: 9.0) == (9.0, 1)


def test_a_cache_folder_that_cannot_be_written_only_forgets(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert best_copy(FACTS, 1 << 20, lambda threads, cache: 9.0) == (9.0, 1)
    assert best_copy(FACTS, 1 << 20, lambda threads, cache: 8.0) == (8.0, 1)


def test_this_machine():
    chip = detect_cpu()
    assert chip is find_chip("cpu")
    assert chip.sm_count >= 1 and chip.memory_bytes > 1 << 28 and chip.l2_bytes > 0
    assert chip.memory_gb_per_s > 0.1 and "measured" in chip.provenance["memory_gb_per_s"]
    assert all(re.match("modelled: .* FLOP per cycle", chip.provenance[f"peak_tflops.{dtype}"]) for dtype in chip.peak_tflops)
    assert copy_gb_per_s(1, 1 << 20, seconds=0.01) > 0.1


def test_a_copy_that_cannot_start_is_not_fatal(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def no_memory(*args):
        raise MemoryError

    monkeypatch.setattr("klab.harness.catalog.cpu.copy_gb_per_s", no_memory)
    chip = chip_of(FACTS, measure=True)
    assert chip.memory_gb_per_s > 0 and "not measured (MemoryError)" in chip.provenance["memory_gb_per_s"]


@pytest.mark.parametrize("name", ["w" * 300, "~nobody-is-called-so", "a\0b"])
def test_a_name_that_can_be_no_file_is_an_unknown_chip(name):
    """Results of others bear any name; a report asks for each."""
    with pytest.raises(UsageError, match="unknown chip"):
        find_chip(name)


def test_no_list_of_chips_is_kept_in_code():
    assert not re.search(r"\b(h100|b200)\b", (PROFILES.parent / "harness/catalog/chips.py").read_text())
    assert chips_module.load_chips() is load_chips()
