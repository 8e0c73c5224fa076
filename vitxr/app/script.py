"""A selection as a script: Python that makes the same mask with NumPy and xarray alone."""

from __future__ import annotations

from typing import Any

from vitxr.app.selection import How, Selection

__all__ = ["script"]

_INSIDE = '''

def inside(points, camera, polygon):
    """Points in a polygon, seen through a camera (even-odd rule)."""
    p = points.astype(np.float32).astype(np.float64)
    camera, polygon = np.asarray(camera), np.asarray(polygon, dtype=np.float64)
    x, y = (c[0] + c[1] * p[:, 0] for c in camera)
    for axis in range(1, p.shape[1]):
        x, y = x + camera[0, axis + 1] * p[:, axis], y + camera[1, axis + 1] * p[:, axis]
    odd = np.zeros(len(p), bool)
    for (xi, yi), (xj, yj) in zip(polygon, np.roll(polygon, 1, axis=0)):
        if yi != yj:
            beside = x < (xj - xi) * (y - yi) / (yj - yi) + xi
            odd ^= ((yi > y) != (yj > y)) & beside
    return odd
'''


def script(selection: Selection, opening: str) -> str:
    """Write a script that makes the selection again.

    Parameters
    ----------
    selection
        What is to be made.
    opening
        Lines that make the embedding ``e``, as ``e = vitxr.open("embedding.nc")``.

    Returns
    -------
    str
        Python. At its end ``selected`` is the mask as a DataArray with the labels of the
        neurons, and ``neurons`` the part of ``e`` that is selected.

    Examples
    --------
    >>> print(script(Selection(None, {"rows": [0, 3]}, "top"), 'e = vitxr.open("e.nc")'))
    # top
    import numpy as np
    import vitxr
    <BLANKLINE>
    e = vitxr.open("e.nc")
    mask = e["patch_row"].isin(range(0, 4)).values
    selected = e["patch_row"].copy(data=mask).rename("selected")
    neurons = e.isel(neuron=mask)
    <BLANKLINE>
    """
    uses = '"polygon"' in selection.to_json()
    name = " ".join(selection.name.split())
    parts = [f"# {name}\nimport numpy as np\nimport vitxr\n", _INSIDE + "\n" if uses else ""]
    parts += [
        f"\n{opening}\nmask = {_expression(selection.how)}\n",
        'selected = e["patch_row"].copy(data=mask).rename("selected")\n',
        "neurons = e.isel(neuron=mask)\n",
    ]
    return "".join(parts)


def _expression(how: How) -> str:
    if "not" in how:
        return f"~({_expression(how['not'])})"
    for join, sign in (("and", " & "), ("or", " | ")):
        if join in how:
            return sign.join(f"({_expression(part)})" for part in how[join])
    if "polygon" in how:
        points = f'e["score"].transpose("neuron", "pc").sel(pc={_plain(how["pcs"])}).values'
        corners, camera = _plain(how["polygon"]), _plain(how["camera"])
        return f"inside(\n    {points},\n    {camera},\n    {corners},\n)"
    parts = []
    if "feature_maps" in how:
        parts.append(f'e["feature_map"].isin({_plain(how["feature_maps"])}).values')
    for key, coord in (("rows", "patch_row"), ("cols", "patch_col")):
        if key in how:
            first, last = how[key]
            parts.append(f'e["{coord}"].isin(range({int(first)}, {int(last) + 1})).values')
    return " & ".join(f"({part})" for part in parts) if len(parts) > 1 else parts[0]


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return repr(int(value)) if isinstance(value, int) else repr(float(value))
