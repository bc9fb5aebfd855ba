"""What the experiments on images share: networks, training, reading, timing."""

from .grey import Grey, load_grey
from .networks import CLASSES, LARGE, Scale, build_cnn, multiply_adds, weights
from .reading import accuracy, logits
from .timing import compare_gated
from .training import Labelled, Recipe, recipe_for, train_acc, train_classifier

__all__ = [
    "CLASSES",
    "LARGE",
    "Grey",
    "Labelled",
    "Recipe",
    "Scale",
    "accuracy",
    "build_cnn",
    "compare_gated",
    "load_grey",
    "logits",
    "multiply_adds",
    "recipe_for",
    "train_acc",
    "train_classifier",
    "weights",
]
