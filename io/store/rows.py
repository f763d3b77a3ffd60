"""Write features of one scale and view in shards, with zeros in the rows of bad tiles."""

from typing import Any

import numpy as np
import numpy.typing as npt

from hmil_fast.io.store.arrays import Group
from hmil_fast.io.store.layout import shard_rows
from hmil_fast.io.store.schema import StoreSpec


class FeatureRows:
    """Takes rows in order and writes whole shards; the last one stays in memory until `finish`.

    Args:
        group: The attempt's group.
        name: Of the array.
        num_tiles: N, rows that will come.
        spec: What the store's slides share.
        most_shard_rows: Upper bound on the rows of a shard.

    Attributes:
        num_tiles: N.
        appended: Rows that came.
    """

    def __init__(
        self, group: Group, name: str, num_tiles: int, spec: StoreSpec, most_shard_rows: int
    ) -> None:
        self.num_tiles = num_tiles
        self.appended = 0
        self._shard = shard_rows(num_tiles, spec.row_bytes, most_shard_rows)
        self._array = group.features(name, num_tiles, self._shard, spec)
        self._buffer = np.empty((min(self._shard, num_tiles), spec.dim), spec.stored_dtype)
        self._filled = 0

    def append(self, features: npt.NDArray[Any]) -> None:
        """Add rows [n, D] of the stored dtype, no more than are still to come. Copied."""
        done = 0
        while done < len(features):
            # a full shard waits for the next row: most slides then stay in memory until
            # commit, which may still have to blank some rows
            if self._filled == self._shard:
                self._flush()
            take = min(self._shard - self._filled, len(features) - done)
            self._buffer[self._filled : self._filled + take] = features[done : done + take]
            self._filled += take
            self.appended += take
            done += take

    def finish(self, bad: npt.NDArray[np.intp]) -> None:
        """Write what is left, with zeros in the rows `bad`."""
        start = self.appended - self._filled
        self._buffer[bad[bad >= start] - start] = 0
        if self._filled:
            self._flush()
        del self._buffer
        for block in np.unique(bad[bad < start] // self._shard):
            first = block * self._shard
            features = self._array.read(first, first + self._shard)
            features[bad[bad // self._shard == block] - first] = 0
            self._array.write(first, features)

    def _flush(self) -> None:
        self._array.write(self.appended - self._filled, self._buffer[: self._filled])
        self._filled = 0
