"""Serving the browser: to this machine only, unless a password is set."""

from __future__ import annotations

import getpass
import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import panel as pn

from vitxr.app.address import follow
from vitxr.app.page import ADDRESS, App, problem_page
from vitxr.app.source import Source, open_source
from vitxr.errors import ArgumentError, VitxrError

__all__ = ["PASSWORD", "origins", "serve", "session"]

#: Environment variable of the password that an address of a network needs.
PASSWORD = "VITXR_BROWSE_PASSWORD"  # noqa: S105 (its name, not a password)
#: Milliseconds after which a closed page is forgotten, and between looking for such.
_FORGET, _LOOK = 15_000, 5_000


def session(source: Source) -> Any:
    """A page for one session, that follows its address and is followed by it."""
    app = App(source)
    if pn.state.location is not None:
        follow(app, ADDRESS, pn.state.location)
    app.start()
    return app


def serve(
    store: str | Path,
    factors: str | Path | None = None,
    *,
    port: int = 5006,
    address: str = "127.0.0.1",
    show: bool = True,
    started: Callable[[Any], None] | None = None,
) -> None:
    """Serve a store to browsers until it is interrupted.

    A store that is there and cannot be opened (unfinished, damaged, of another schema) is served
    as a page that says so; it is tried again for every session.

    Parameters
    ----------
    store, factors
        As for :func:`vitxr.app.source.open_source`.
    port
        0 for any that is free.
    address
        To listen on. Another than this machine's own needs a password.
    show
        Open a browser.
    started
        Called with the server before it runs.

    Raises
    ------
    ArgumentError
        If the address is of a network and there is no password, or cannot be listened on.
    StoreError
        If there is nothing at one of the paths.
    """
    password = None if _is_own(address) else _password(address)
    opened: list[Source] = []

    def source() -> Source:
        if not opened:
            opened.append(open_source(store, factors))
        return opened[0]

    def page() -> Any:
        try:
            return session(source())
        except VitxrError as error:
            return problem_page(error, str(store))

    try:
        source()
    except VitxrError as error:
        if any(_is_missing(path) for path in (store, factors)):
            raise
        print(f"vitxr browse: {error}", file=sys.stderr, flush=True)  # as the page will say
    _forbid_other_origins()
    port = _free(address, port)
    options: dict[str, Any] = {}
    if password is not None:
        options = {
            # With a name: a password alone is read as a file where it is the path of one.
            "basic_auth": {"vitxr": password},
            "basic_login_template": str(Path(__file__).with_name("login.html")),
            "cookie_secret": secrets.token_hex(32),
        }
    server = pn.serve(
        {"/": page},
        port=port,
        address=address,
        websocket_origin=origins(address, port),
        show=show,
        start=False,
        title="vitxr",
        verbose=False,
        unused_session_lifetime_milliseconds=_FORGET,
        check_unused_sessions_milliseconds=_LOOK,
        websocket_max_message_size=2_000_000,
        **options,
    )
    host = f"[{address}]" if ":" in address else address
    print(f"Browse {store} at http://{host}:{port}/ (Ctrl-C stops)", flush=True)
    if started is not None:
        started(server)
    server.run_until_shutdown()


def origins(address: str, port: int) -> list[str]:
    """Hosts whose pages may open a websocket: those under which the server is reached, no others.

    Examples
    --------
    >>> origins("127.0.0.1", 5006)
    ['127.0.0.1:5006', 'localhost:5006']
    """
    if _is_own(address):
        names = ["127.0.0.1", "localhost"] if address in ("127.0.0.1", "localhost") else [address]
        if address == "::1":
            names = ["[::1]", "localhost"]
    elif address in ("0.0.0.0", "::"):  # noqa: S104 (compared, not listened on)
        own = socket.gethostname()
        try:
            found = {info[4][0] for info in socket.getaddrinfo(own, None)}
        except OSError:  # a machine need not know itself by name
            found = set()
        numbers = sorted(f"[{a}]" if ":" in str(a) else str(a) for a in found)
        names = list(dict.fromkeys([own, socket.getfqdn(), *numbers, "127.0.0.1", "localhost"]))
    else:
        names = [f"[{address}]" if ":" in address else address]
    # Browsers write the host of an origin in small letters, whatever a machine calls itself.
    return list(dict.fromkeys(f"{name}:{port}".lower() for name in names))


def _is_own(address: str) -> bool:
    """Whether an address reaches this machine only."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _password(address: str) -> str:
    """The password, from the environment or asked for: never from the command line."""
    password = os.environ.get(PASSWORD, "")
    if not password and sys.stdin is not None and sys.stdin.isatty():
        password = getpass.getpass(f"Password for browsers at {address}: ")
    if not password:
        raise ArgumentError(
            f"address {address!r} can be reached from other machines, and there is no password. "
            f"Set one in the environment variable {PASSWORD}, or leave --address out: 127.0.0.1 is "
            "reached from this machine only, from another through ssh -L."
        )
    return password


def _forbid_other_origins() -> None:
    """Keep BOKEH_ALLOW_WS_ORIGIN from taking the place of the origins that are allowed."""
    os.environ.pop("BOKEH_ALLOW_WS_ORIGIN", None)


def _is_missing(path: str | Path | None) -> bool:
    return path is not None and "://" not in str(path) and not Path(path).exists()


def _free(address: str, port: int) -> int:
    """The port, or any that is free where it is 0; an error where it is not."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        # As the server will: a port whose last connections are still closing is free.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name != "nt"))
        try:
            one.bind((address, port))
        except (OSError, OverflowError) as error:
            raise ArgumentError(
                f"port {port} of address {address!r} cannot be listened on: {error}. Give another "
                "port (0 for any that is free), or an address of this machine."
            ) from error
        return int(one.getsockname()[1])
