"""Threads for work on megabytes of an adapter: reading, hashing, copying, which do not hold Python's lock."""

import functools
from concurrent.futures import ThreadPoolExecutor

_THREADS = 8


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Return the process's threads. What runs in them must not wait for others of them.

    They are started once: a start waits for the new thread to hold Python's lock, and adapters are read by several
    threads beside an engine's.
    """
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="qwen2_jax adapter data")
