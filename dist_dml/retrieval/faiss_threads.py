"""FAISS with the threads of this worker."""

from __future__ import annotations

from types import ModuleType

import torch


def faiss_with_worker_threads() -> ModuleType:
    """FAISS, limited to the CPU threads that this worker was given.

    FAISS has an OpenMP pool of its own that takes every core unless told otherwise; with several
    workers on a machine they would crowd each other out. The worker's share is what torch was told.
    """
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
