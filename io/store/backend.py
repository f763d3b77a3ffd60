"""Choose the backend of a location: the one place that tells folders from URLs."""

from typing import Any

from hmil_fast.io.store.local import LocalBackend
from hmil_fast.io.store.location import Location, ObjectUrl
from hmil_fast.io.store.objects import ObjectBackend
from hmil_fast.io.store.protocol import Backend

_LOCAL, _OBJECTS = LocalBackend(), ObjectBackend()


def backend_of(place: Location) -> Backend[Any]:
    """Return the backend that reads and writes at a location.

    Example:
        ``backend_of(store).names(store / "slides")``
    """
    return _OBJECTS if isinstance(place, ObjectUrl) else _LOCAL
