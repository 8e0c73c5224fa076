"""The address of a page and its state: each follows the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

import param
from param.parameterized import batch_call_watchers

if TYPE_CHECKING:
    from vitxr.app.page import App

__all__ = ["follow", "read", "written"]

#: Characters of an address that servers and browsers take.
_LONGEST = 30_000


def read(state: param.Parameterized, names: Mapping[str, str], search: str) -> dict[str, str]:
    """Set the parameters that an address gives, all at once.

    Parameters
    ----------
    state
        What is set.
    names
        Of its parameters, and what the address calls each.
    search
        ``?name=value&...``; other names are passed over.

    Returns
    -------
    dict of str to str
        What the parameters do not take, which is left out. A value is read as its parameter has
        it: an image that is called ``7`` is no number.

    Examples
    --------
    >>> class Shown(param.Parameterized):
    ...     image = param.Selector(default="7", objects=["7", "8"])
    ...     row = param.Integer(0, bounds=(0, 3))
    >>> shown = Shown()
    >>> read(shown, {"image": "image", "row": "r"}, "?image=8&r=4")
    {'row': '4'}
    >>> shown.image, shown.row
    ('8', 0)
    """
    given, wrong = _parsed(search), {}
    with batch_call_watchers(state):
        for name, said in names.items():
            if said in given:
                try:
                    setattr(state, name, _value(state.param[name], given[said]))
                except (ValueError, RecursionError):
                    wrong[name] = given[said]
    return wrong


def written(state: param.Parameterized, names: Mapping[str, str], search: str = "") -> str:
    """Write the parameters into an address, beside what else it holds."""
    return "?" + urlencode(
        _parsed(search) | {said: _text(getattr(state, name)) for name, said in names.items()}
    )


def follow(app: App, names: Mapping[str, str], location: Any) -> None:
    """Let a page follow its address, and the address the page."""
    reading = False

    def look(*_: Any) -> None:
        nonlocal reading
        if location.search == written(app.state, names, location.search):
            return
        reading = True
        try:
            wrong = read(app.state, names, location.search)
        finally:
            reading = False
        if wrong:
            app.tell_address(wrong)
        write()

    def write(*_: Any) -> None:
        if reading:
            return
        search = written(app.state, names, location.search)
        if len(search) > _LONGEST:
            app.tell_too_long()
        else:
            location.search = search

    look()
    app.state.param.watch(write, list(names))
    location.param.watch(look, "search")


def _parsed(search: str) -> dict[str, str]:
    return dict(parse_qsl(search.removeprefix("?"), keep_blank_values=True))


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else str(value)


def _value(parameter: param.Parameter, text: str) -> Any:
    if isinstance(parameter, param.Selector):
        known = {str(one): one for one in parameter.objects}
        if text not in known:
            raise ValueError(text)
        return known[text]
    if isinstance(parameter, param.Integer):
        return int(text)
    return json.loads(text) if isinstance(parameter, param.Dict) else text
