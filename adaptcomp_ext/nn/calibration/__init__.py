"""Thresholds for a compute budget or a bounded risk, and the curve of accuracy against compute."""

from adaptcomp_ext.nn.calibration.calibrate import Calibration, calibrate
from adaptcomp_ext.nn.calibration.curve import ComputeCurve, compute_curve

__all__ = ["Calibration", "ComputeCurve", "calibrate", "compute_curve"]
