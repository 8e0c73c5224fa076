"""Stimuli: labelled images from files and arrays, and the lattices they are shifted over."""

from vitxr.stimuli.images import open_images, read_image
from vitxr.stimuli.shifts import ShiftGrid

__all__ = ["ShiftGrid", "open_images", "read_image"]
