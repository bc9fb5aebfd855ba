"""Slots that are refilled from a stream of samples."""

from adaptcomp_ext.nn.batching.batcher import ContinuousBatcher
from adaptcomp_ext.nn.batching.carry import CarryBlock, CarryLoader
from adaptcomp_ext.nn.batching.errors import BadSampleError, SampleError
from adaptcomp_ext.nn.batching.statistics import BatcherStatistics

__all__ = [
    "BadSampleError",
    "BatcherStatistics",
    "CarryBlock",
    "CarryLoader",
    "ContinuousBatcher",
    "SampleError",
]
