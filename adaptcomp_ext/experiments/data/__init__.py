"""Data sets of the experiments."""

from .images import ImageData, fetch_mnist, find_images, load_digits, load_mnist, read_idx
from .stroop import COLOURS, GREY, NEUTRAL_INK, Condition, StroopMNIST, colour, draw_inks

__all__ = [
    "COLOURS",
    "GREY",
    "NEUTRAL_INK",
    "Condition",
    "ImageData",
    "StroopMNIST",
    "colour",
    "draw_inks",
    "fetch_mnist",
    "find_images",
    "load_digits",
    "load_mnist",
    "read_idx",
]
