"""One thread for each BLAS call, where Dask's threads or a model's are at work beside it.

BLAS libraries keep their idle threads spinning: small products take several times as long with
two threads on a core that another computation has.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["one_thread"]

_lock = threading.Lock()
_inside = 0
_limit: Any = None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit BLAS to one thread; what it was is restored when the last thread has left.

    Examples
    --------
    >>> import numpy as np
    >>> with one_thread():
    ...     print(int(np.ones(3) @ np.ones(3)))
    3
    """
    global _inside, _limit
    with _lock:  # the limit is the process's: of two threads the second would restore the first's
        if not _inside:
            _limit = _libraries().limit(limits=1, user_api="blas")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _limit.restore_original_limits()


@functools.cache
def _libraries() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()  # to look for them takes as long as a product
