"""The flags of `pack inspect`: likely problems of a pack. Each has a code, its subject, and a sentence with the fix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PARALLEL = 0.95  # |cos| above which two directions measure the same
Flag = tuple[str, str, str]  # code, subject, message


def flags(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The flags of an inspected pack (`inspection.inspect_pack`)."""
    raised = [*_base(report["base"]), *_adapters(report["adapters"]), *_probes(report["probes"])]
    raised += [*_steering(report), *_cosines(report["cosines"])]
    return [{"code": code, "about": about, "message": message} for code, about, message in raised]


def _base(base: Mapping[str, Any]) -> Iterator[Flag]:
    if not base["here"]:
        yield (
            "no-base-weights",
            base["model"],
            f"The weights of '{base['model']}' are not on this machine: the first run fetches them if it can reach the "
            "Hub or a package index. Otherwise copy them here and name the folder with --model.",
        )


def _adapters(adapters: Mapping[str, Mapping[str, Any]]) -> Iterator[Flag]:
    for name, a in adapters.items():
        if a["not_finite"]:
            yield (
                "not-finite",
                name,
                f"The adapter '{name}' has values that are not finite in {_of(a['not_finite'], a)}: copy or build it "
                "again.",
            )
        elif "direction" in a["roles"] and a["norm"] == 0:
            yield (
                "zero-direction",
                name,
                f"The direction '{name}' is zero, so its probe scores every row 0: build it again.",
            )
        if "state" in a["roles"] and a["zero_B"]:
            yield (
                "insensitive-state",
                name,
                f"The state '{name}' has B = 0 in {_of(a['zero_B'], a)}, where half of the gradient vanishes: take a "
                "checkpoint of a fine-tune as state.",
            )
        if not (a["provenance"] or {}).get("licence"):
            yield (
                "no-licence",
                name,
                f"The pack names no licence for what '{name}' was trained on: add it to \"provenance\" in pack.json.",
            )


def _probes(probes: list[Mapping[str, Any]]) -> Iterator[Flag]:
    for probe in probes:
        name, weight = probe["name"], probe["weight"]
        if weight == 0 or (name.startswith("danger") and weight < 0) or (name.startswith("safety") and weight > 0):
            yield (
                "unusual-weight",
                name,
                f"The probe '{name}' has the weight {weight:g}: danger should count positively in the risk and "
                "safety negatively. Fix it in pack.json or rename the probe.",
            )
        if not probe["modules"]["common"]:
            yield (
                "no-overlap",
                name,
                f"The probe '{name}' is always 0, because its direction '{probe['direction']}' and its state "
                f"'{probe['state']}' have no module in common: train both on the same modules.",
            )


def _steering(report: Mapping[str, Any]) -> Iterator[Flag]:
    verdicts = {probe["direction"]: (probe["steers"], probe["steering_outdated"]) for probe in report["probes"]}
    for direction, (steers, outdated) in verdicts.items():
        if outdated:
            yield (
                "steering-outdated",
                direction,
                f"The pack has changed since it was steered along '{direction}': run sqsd-filter steer on it again, "
                "with safe and unsafe answers and --record.",
            )
        elif steers is None:
            yield (
                "not-steered",
                direction,
                f"It is not known whether moving the model along '{direction}' has the expected effect: run "
                "sqsd-filter steer on the pack, with safe and unsafe answers and --record.",
            )
        elif not steers:
            yield (
                "does-not-steer",
                direction,
                f"Moving the model along '{direction}' does not have the expected effect: build the direction again, "
                "on more or clearer data.",
            )


def _cosines(cosines: list[Mapping[str, Any]]) -> Iterator[Flag]:
    for pair in cosines:
        a, b = pair["directions"]
        if abs(pair["global"] or 0.0) > PARALLEL:
            yield (
                "parallel-directions",
                f"{a}, {b}",
                f"The directions '{a}' and '{b}' are nearly parallel (cosine {pair['global']:.3f}), so both measure "
                "the same: drop one, or train them on different data.",
            )


def _of(some: list[str], adapter: Mapping[str, Any]) -> str:
    return f"{len(some)} of {adapter['modules']} modules ({some[0]}{', ...' if len(some) > 1 else ''})"
