"""How busy the machine is, under the names that MLflow's page of system metrics looks for."""

from __future__ import annotations

import importlib
from typing import Any


def gpu_handles() -> list[Any]:
    """NVML's handles of all GPUs of the machine; none without a driver or without pynvml."""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # pynvml is optional, and its errors are not known without it.
        return []


def read_system(handles: list[Any]) -> dict[str, float]:
    """Processor and memory of the machine, and of each GPU in `handles` what it tells.

    Processor use is the mean since the last call; the first call only starts the measurement.
    """
    import psutil

    memory = psutil.virtual_memory()
    values = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    for index, handle in enumerate(handles):
        values |= _read_gpu(index, handle)
    return values


def _read_gpu(index: int, handle: Any) -> dict[str, float]:
    """Use, memory and power of one GPU. A slice of a shared GPU (MIG) refuses some: left out."""
    pynvml = importlib.import_module("pynvml")
    prefix = f"system/gpu_{index}"
    values: dict[str, float] = {}
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        values[f"{prefix}_memory_usage_megabytes"] = float(memory.used) / 1e6
        values[f"{prefix}_memory_usage_percentage"] = (
            100.0 * float(memory.used) / float(memory.total)
        )
        use = pynvml.nvmlDeviceGetUtilizationRates(handle)
        values[f"{prefix}_utilization_percentage"] = float(use.gpu)
        values[f"{prefix}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    except pynvml.NVMLError:
        pass
    return values
