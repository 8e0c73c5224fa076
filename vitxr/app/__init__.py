"""The browser of a store: linked pictures of what was extracted and found.

State, views and their layout; drawing is left to :mod:`vitxr.plot`. Importing this package
loads neither Panel nor HoloViews; :func:`vitxr.browse` does.
"""
