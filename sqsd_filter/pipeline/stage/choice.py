"""The choice of an engine: this process, or Ray."""

from __future__ import annotations

import os

from sqsd_filter.errors import UsageError
from sqsd_filter.pipeline.stage.engines import Engine, LocalEngine

ENGINES = ("auto", "local", "ray")


def choose_engine(
    engine: str = "auto",
    *,
    replicas: int | None = None,
    gpus_per_replica: float | None = None,
    ray_address: str | None = None,
    device: str | None = None,
) -> Engine:
    """The engine of this name. `auto` takes Ray if there is more than one replica, an address of a cluster, or more
    than one GPU and no `device`.

    Raises `UsageError` for numbers that make no sense, and for settings of Ray with the local engine.
    """
    if engine not in ENGINES:
        raise UsageError(f"The engine must be one of {', '.join(ENGINES)}, not '{engine}'.")
    if replicas is not None and replicas < 1:
        raise UsageError("--replicas must be at least 1.")
    if gpus_per_replica is not None and (gpus_per_replica < 0 or (gpus_per_replica > 1 and gpus_per_replica % 1)):
        raise UsageError("--gpus-per-replica must be a share of one GPU, or a whole number of them.")
    asked = (replicas or 1) > 1 or bool(gpus_per_replica) or bool(ray_address)
    if engine == "local":
        if asked:
            raise UsageError("--engine local runs one replica in this process: leave out --replicas, "
                             "--gpus-per-replica and --ray-address, or choose --engine ray.")  # fmt: skip
        return LocalEngine()
    if engine == "auto" and not asked and not os.environ.get("RAY_ADDRESS") and (device or _gpus() < 2):
        return LocalEngine()
    from sqsd_filter.pipeline.stage.ray_engine import RayEngine

    return RayEngine(replicas, gpus_per_replica, ray_address or os.environ.get("RAY_ADDRESS"))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
