"""What is said of a GPU from what the driver knows of it: identity, settings, health of the memory, links. Pure functions of node_facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from klab.harness.watch.grade import Checks, Figure, Grade, NodeRule
from klab.harness.watch.node_facts import RECOVERY_ACTIONS, grown
from klab.harness.watch.reference_nodes import Reference, kind_of
from klab.kernels.contract import Chip, Json

Facts = Mapping[str, Json]

# What NVIDIA's catalogue says of an Xid (https://docs.nvidia.com/deploy/xid-errors).
XIDS = {
    13: "graphics engine exception", 31: "memory page fault", 43: "stopped processing", 45: "preemptive cleanup", 46: "stopped processing",
    48: "double-bit ECC error", 62: "micro-controller halt", 63: "row remapped", 64: "row remapping failed", 74: "NVLink error",
    79: "fallen off the bus", 92: "high rate of single-bit errors", 94: "contained memory error", 95: "uncontained memory error",
    119: "GSP timeout", 120: "GSP error", 136: "link training failed", 140: "unrecovered ECC error", 154: "recovery action changed",
    156: "resource retired", 157: "resource retirement failed", 158: "fatal timeout", 171: "uncorrectable DRAM error",
    172: "uncorrectable SRAM error",
}  # fmt: skip
# For these NVIDIA's immediate action is to ignore them.
MILD_XIDS = (43, 63, 92)
# A few replays are what a link is made to live with; hundreds within minutes point at a bad contact (guess).
REPLAYS_WARN, REPLAYS_FAIL = 10, 1000
# Recoveries and CRC errors of NVLink; a healthy link has none in minutes, and a bad one has thousands (guess).
NVLINK_FAIL = 100


def identity(add: Checks, facts: Facts, chip: Chip, reference: Reference, rule: NodeRule) -> None:
    """Is it the chip that was ordered, whole, and ready?"""
    add, why = add.on("identity"), facts.get("why", {})
    add.holds(
        "chip", kind_of(chip) == reference.name, str(facts.get("name")), reference.name, label="chip", reason="another chip",
        remedy="ask for the chip that was ordered, or name the right one with --reference",
    )  # fmt: skip
    memory = facts.get("memory_bytes")
    if memory is None:
        add.unknown("memory", why.get("memory_bytes"))
    else:
        whole = memory >= rule.memory_share_fail * chip.memory_bytes
        source = chip.provenance.get("memory_bytes", "")
        expected = f"{chip.memory_bytes / 1e9:.0f} GB"
        add.holds("memory", whole, f"{memory / 1e9:.1f} GB", expected, label="chip", source=source, reason="part of the memory is missing")
    count = facts.get("sm_count")
    if count is None:
        add.unknown("multiprocessors", "no process on it told them")
    else:
        source = chip.provenance.get("sm_count", "")
        add.holds("multiprocessors", count == chip.sm_count, str(count), str(chip.sm_count), label="chip", source=source,
                  reason="not the whole chip, or another one")  # fmt: skip
    _switch(add, "MIG", facts, "mig", want=False, reason="a slice is not the whole GPU", remedy="the owner switches MIG off")
    action = facts.get("recovery_action")
    if action is None:
        add.unknown("recovery action", why.get("recovery_action"))
    else:
        said = RECOVERY_ACTIONS.get(action, str(action))
        add.holds("recovery action", not action, said, "none", reason="the driver asks for it", remedy=f"the owner does it: {said}")
    if facts.get("inforom_valid"):
        add.add("InfoROM", Grade.PASS, "valid", expected="valid", label="device")
    elif "corrupt" in str(why.get("inforom_valid", "")).lower():
        add.add("InfoROM", Grade.FAIL, "corrupted", expected="valid", label="device", reason="by its checksum", remedy="replace the GPU")
    else:
        add.unknown("InfoROM", why.get("inforom_valid"))
    fabric = facts.get("fabric")
    if fabric is None:
        add.unknown("NVSwitch fabric", why.get("fabric"))
    elif fabric["state"] != "not supported":
        fine = fabric["state"] == "completed" and not fabric["status"]
        add.holds("NVSwitch fabric", fine, f"{fabric['state']}, status {fabric['status']}", "completed, status 0",
                  reason="the GPU is not registered with the fabric",
                  remedy="the owner starts nvidia-fabricmanager, of the driver's version")  # fmt: skip


def _switch(add: Checks, name: str, facts: Facts, key: str, *, want: bool, bad: Grade = Grade.FAIL, **more: Json) -> None:
    words = {True: "on", False: "off"}
    value = facts.get(key)
    if value is None:
        add.unknown(name, facts.get("why", {}).get(key))
    else:
        add.holds(name, bool(value) == want, words[bool(value)], words[want], bad=bad, **{"label": "rule", **more})


def settings(add: Checks, facts: Facts, chip: Chip, reference: Reference) -> None:
    """Driver, persistence, limits of power and clock, other users."""
    add, why = add.on("settings"), facts.get("why", {})
    driver = facts.get("driver")
    if driver is None:
        add.unknown("driver", why.get("driver"))
    else:
        first = str(driver).split(".")[0]
        branch = Figure(float(first) if first.isdigit() else 0.0)
        add.measured("driver", "", branch, reference.expected.get("driver_branch"), value=f"{driver} (CUDA {facts.get('driver_cuda')})",
                     remedy="the owner installs a newer driver")  # fmt: skip
    _switch(add, "persistence", facts, "persistence", want=True, bad=Grade.WARN, reason="each first start loads the driver anew",
            remedy="the owner sets it: nvidia-smi -pm 1")  # fmt: skip
    _power_limit(add, facts, chip)
    _maximum_clock(add, facts, chip)
    others = facts.get("processes")
    if others is None:
        add.unknown("other processes", why.get("processes"))
    else:
        add.holds("other processes", not others, str(len(others)), "0", bad=Grade.WARN, label="rule",
                  reason="they compute on it, so that its figures are not its own", remedy="end them and run this again")  # fmt: skip


def _power_limit(add: Checks, facts: Facts, chip: Chip) -> None:
    limit, usual = facts.get("power_limit_w"), facts.get("power_limit_default_w")
    if limit is None:
        add.unknown("power limit", facts.get("why", {}).get("power_limit_w"))
        return
    wanted = max(chip.tdp_w or 0.0, usual or 0.0)
    # A tenth less power costs a matmul some percent of its speed (guess); the rated power is what was ordered all the same.
    grade = Grade.PASS if limit >= 0.995 * wanted else Grade.WARN if limit >= 0.9 * wanted else Grade.FAIL
    source = chip.provenance.get("tdp_w", "") if wanted == chip.tdp_w else "the device's default"
    reason = f"{1 - limit / wanted:.0%} less power than the chip is made for"
    add.add("power limit", grade, f"{limit:.0f} W", expected=f"{wanted:.0f} W", label="chip", source=source, reason=reason,
            remedy=f"the owner raises it: nvidia-smi -pl {wanted:.0f}", figure=float(limit), unit="W")  # fmt: skip


def _maximum_clock(add: Checks, facts: Facts, chip: Chip) -> None:
    top, application = facts.get("max_sm_clock_mhz"), facts.get("application_sm_clock_mhz")
    if top is None:
        add.unknown("maximum clock", facts.get("why", {}).get("max_sm_clock_mhz"))
        return
    held = application is not None and application < 0.99 * top
    allowed = application if held else top
    reason = "application clocks hold it lower" if held else "lower than the chip's"
    remedy = "the owner resets it: nvidia-smi -rac" if held else ""
    add.holds("maximum clock", not held and top >= 0.99 * chip.max_clock_mhz, f"{allowed:,.0f} MHz", f"{chip.max_clock_mhz:,.0f} MHz",
              bad=Grade.WARN, label="chip", source=chip.provenance.get("max_clock_mhz", ""), reason=reason, remedy=remedy)  # fmt: skip


def memory_health(add: Checks, before: Facts, after: Facts) -> None:
    """ECC, remapped rows and what is left to remap with; what grew during the run counts most."""
    add, why, more = add.on("memory health"), after.get("why", {}), grown(before, after)
    _switch(add, "ECC", before, "ecc", want=True, reason="errors of the memory are neither corrected nor seen",
            remedy="the owner switches it on: nvidia-smi -e 1, then a reset")  # fmt: skip
    ever, now = after.get("ecc_uncorrected_ever"), more.get("ecc_uncorrected", more.get("ecc_uncorrected_ever"))
    if ever is None and not now:
        add.unknown("uncorrected errors", why.get("ecc_uncorrected_ever"), needed=True)
    else:
        add.add("uncorrected errors", Grade.FAIL if now else Grade.WARN if ever else Grade.PASS, f"{_said(now)} now, {_said(ever)} ever",
                expected="0", label="rule", reason="errors during this run" if now else "errors in the past",
                remedy="replace the GPU" if now else "ask for the history of this GPU", needed=True)  # fmt: skip
    corrected = more.get("ecc_corrected")
    if corrected is None:
        add.unknown("corrected errors", why.get("ecc_corrected"))
    else:
        add.holds("corrected errors", not corrected, f"{corrected} now, {_said(after.get('ecc_corrected_ever'))} ever", "0 now",
                  bad=Grade.WARN, label="rule", reason="the memory errs under load", remedy="run this longer, and watch it")  # fmt: skip
    sram = after.get("sram_threshold_exceeded")
    if sram is None:
        add.unknown("SRAM errors", why.get("sram_threshold_exceeded"))
    else:
        add.holds("SRAM errors", not sram, "above the threshold" if sram else "below the threshold", "below the threshold",
                  source="the driver's own threshold (nvmlEccSramErrorStatus)", reason="the threshold for replacement is exceeded",
                  remedy="replace the GPU")  # fmt: skip
    _rows(add, after, more)


def _said(value: Json) -> str:
    return "not known" if value is None else str(value)


def _rows(add: Checks, after: Facts, more: Mapping[str, int]) -> None:
    corrected, uncorrected = after.get("rows_corrected"), after.get("rows_uncorrected")
    if corrected is None:
        add.unknown("remapped rows", after.get("why", {}).get("rows_corrected"), needed=True)
        return
    during = more.get("rows_corrected", 0) + more.get("rows_uncorrected", 0)
    if after["rows_failed"]:
        grade, reason, remedy = Grade.FAIL, "a remapping failed", "replace the GPU"
    elif after["rows_pending"]:
        grade, reason, remedy = Grade.FAIL, "a remapping is pending", "the owner resets the GPU, then this is run again"
    elif during:
        grade, reason, remedy = Grade.FAIL, f"{during} rows were remapped during this run", "replace the GPU"
    elif uncorrected:
        grade, reason, remedy = Grade.WARN, "rows have failed in the past", "ask for the history of this GPU"
    else:
        grade, reason, remedy = Grade.PASS, "", ""
    source = "NVML: a pending remapping takes effect at a reset, a failed one is for good"
    value = f"{corrected + uncorrected} ({uncorrected} for uncorrected errors)"
    add.add("remapped rows", grade, value, expected="none failed, none pending", label="device", source=source, reason=reason,
            remedy=remedy, needed=True)  # fmt: skip
    reserve = after.get("remap_reserve")
    if not reserve:
        add.unknown("rows in reserve", after.get("why", {}).get("remap_reserve"))
    else:
        reason = f"{reserve['none']} banks have none left" if reserve["none"] else f"{reserve['low']} banks have few left"
        grade = Grade.FAIL if reserve["none"] else Grade.WARN if reserve["low"] else Grade.PASS
        add.add("rows in reserve", grade, f"{reserve['max']} of {sum(reserve.values())} banks have all", expected="no bank without",
                label="device", reason=reason, remedy="replace the GPU" if reserve["none"] else "")  # fmt: skip


def links(add: Checks, before: Facts, after: Facts, loaded: Sequence[Facts], reference: Reference, *, alone: bool) -> None:
    """PCIe as it is under load (an idle GPU rests in the first generation), NVLink, and the errors of both."""
    add, why, more = add.on("links"), after.get("why", {}), grown(before, after)
    for key, name in (("pcie_generation", "PCIe generation"), ("pcie_width", "PCIe width")):
        seen = [int(line[key]) for line in loaded if line.get(key) is not None]
        if not seen:
            add.unknown(name, why.get(key) or "nothing was read under load")
            continue
        most = after.get(f"{key}_max")
        # A link rests in a lower generation, and may be seen on its way; no link of these boards rests in a smaller width.
        judged = max(seen) if key == "pcie_generation" else min(seen)
        value = f"{judged} under load" if len(set(seen)) == 1 else f"{min(seen)} to {max(seen)} under load"
        add.measured(name, "", Figure(float(judged)), reference.expected.get(key), value=value,
                     remedy="reseat the board or its riser, and look at the slot's settings")  # fmt: skip
        if add.found[-1].grade == Grade.PASS and min(seen) < max(seen):
            reason = f"the link fell to {min(seen)} under load"
            add.found[-1] = dataclasses.replace(add.found[-1], grade=Grade.WARN.value, reason=reason)
        if add.found[-1].grade == Grade.PASS and most is not None and max(seen) < most:
            add.found[-1] = dataclasses.replace(add.found[-1], grade=Grade.WARN.value, reason=f"the link can do {most}")
    replays = more.get("pcie_replays")
    if replays is None:
        add.unknown("PCIe replays", why.get("pcie_replays"))
    else:
        add.limited("PCIe replays", Figure(float(replays)), f"{replays} during the run", warn_above=REPLAYS_WARN, fail_above=REPLAYS_FAIL,
                    reason="the link repeats itself", remedy="reseat the board or its riser")  # fmt: skip
    if alone:  # one GPU of a larger machine may be given without its links
        return
    active = after.get("nvlinks_active")
    if active is None:
        add.unknown("NVLinks active", why.get("nvlinks_active"))
        return
    down = ", ".join(map(str, after.get("nvlinks_down") or []))
    add.measured("NVLinks active", "", Figure(float(active)), reference.expected.get("nvlinks_active"),
                 remedy=f"link {down} is down: reset it, or replace the GPU or the baseboard")  # fmt: skip
    speed = after.get("nvlink_mb_per_s")
    if speed is None:
        add.unknown("NVLink speed", why.get("nvlink_mb_per_s"))
    else:
        add.measured("NVLink speed", "MB/s", Figure(float(speed)), reference.expected.get("nvlink_mb_per_s"))
    errors = more.get("nvlink_errors")
    if errors is None:
        add.unknown("NVLink errors", why.get("nvlink_errors"))
    else:
        add.limited("NVLink errors", Figure(float(errors)), f"{errors} during the run", warn_above=0, fail_above=NVLINK_FAIL,
                    reason="replays, recoveries or CRC errors", remedy="reseat or replace the GPU or the baseboard")  # fmt: skip


def xids(add: Checks, found: Sequence[int], trouble: str) -> None:
    """Xid errors that the driver reported during the run."""
    add = add.on("errors")
    if trouble and not found:
        add.unknown("Xid", trouble)
        return
    said = ", ".join(f"{xid} ({XIDS.get(xid, 'see the catalogue')})" for xid in dict.fromkeys(found))
    mild = all(xid in MILD_XIDS for xid in found)
    add.holds("Xid", not found, said or "none", "none", bad=Grade.WARN if mild else Grade.FAIL, source="NVIDIA's Xid catalogue",
              reason="the driver reported errors during the run", remedy="as the catalogue says: reset, or replace the GPU")  # fmt: skip
