"""Ctrl-C, held back while what is finished is put together."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["held"]


@contextlib.contextmanager
def held() -> Iterator[list[int]]:
    """Hold back SIGINT, and a SIGTERM that this program handles, to the end of the block.

    Fits may have taken hours; a Ctrl-C while they are labelled, compared or written would lose
    them. At the end the handlers are back, and are called for what came; a KeyboardInterrupt of
    theirs goes no further: whoever holds looks at what came. In other threads than the main one,
    which gets all signals, nothing is held.

    Yields
    ------
    list of int
        The signals that came.

    Examples
    --------
    >>> with held() as came:
    ...     signal.raise_signal(signal.SIGINT)
    >>> came == [signal.SIGINT]
    True
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, _: Any) -> None:
        came.append(number)

    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    # signal.SIG_DFL and SIG_IGN are numbers: who is to be killed is, who ignores goes on ignoring.
    for number in handled:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(came):
            with contextlib.suppress(KeyboardInterrupt):
                handled[number](number, None)
