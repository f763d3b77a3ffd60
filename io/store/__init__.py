"""Feature store: one zarr v3 group per slide, published whole or not at all."""

from hmil_fast.io.store.augmented_view import at_view
from hmil_fast.io.store.layout import slide_dirname
from hmil_fast.io.store.opening import create_store, open_store
from hmil_fast.io.store.scales import at_scale, join_scales
from hmil_fast.io.store.schema import SlideRecord, StoredObject, StoreSpec
from hmil_fast.io.store.store import FeatureStore
from hmil_fast.io.store.verify import Finding
from hmil_fast.io.store.writer import SlideWriter

__all__ = [
    "FeatureStore",
    "Finding",
    "SlideRecord",
    "SlideWriter",
    "StoreSpec",
    "StoredObject",
    "at_scale",
    "at_view",
    "create_store",
    "join_scales",
    "open_store",
    "slide_dirname",
]
