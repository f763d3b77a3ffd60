"""Old names of `cache` and `sampler`."""

from hmil_fast.bags.cache import FeatureCache
from hmil_fast.bags.sampler import epoch_batches

__all__ = ["FeatureCache", "epoch_batches"]
