"""The tasks of `make evaluate`: cohorts of real instances, one draw or one split per seed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bench.accuracy.sources import Floats, Ints, classic_bags, fashion_pictures, pcam_features
from hmil_fast.labels import LabelTree

GARMENTS: dict[str, object] = {
    "clothes": {
        "tops": ["T-shirt/top", "Pullover", "Shirt"],
        "bottoms": ["Trouser"],
        "dresses": ["Dress"],
        "outers": ["Coat"],
    },
    "goods": {"accessories": ["Bag"], "shoes": ["Sandal", "Sneaker", "Ankle boot"]},
}
GARMENT_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
TUMOUR: dict[str, object] = {
    "negative": ["negative"],
    "positive": ["isolated_cells", "micro", "macro"],
}
# label: share of the slides, tumour tiles of the slide's 48 (numpy's half-open ranges)
BURDEN = {
    "negative": (0.40, (0, 1)),
    "isolated_cells": (0.30, (3, 6)),
    "micro": (0.18, (9, 16)),
    "macro": (0.12, (24, 41)),
}
SLIDE_TILES = 48


@dataclass(frozen=True)
class Cohort:
    """Bags, their labels, and who is tested when.

    Attributes:
        tree: The label tree.
        x: Features, float32 [N, D].
        bags: (start, length) of each bag in x, int64 [B, 2].
        y: Leaf of each bag, int64 [B].
        tests: Positions of the bags that each fold tests; it trains on all others.
        mixed_units: Whether the features are quantities of different scale, which every method
            then gets standardised by the training bags.
        tumour: Whether each instance is tumour, bool [N]; None where nobody says.
    """

    tree: LabelTree
    x: Floats
    bags: Ints
    y: Ints
    tests: tuple[Ints, ...]
    mixed_units: bool = False
    tumour: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Task:
    """A cohort to be drawn.

    Attributes:
        name: Its name on the command line.
        title: Its name in the table.
        draw: The cohort of a seed; raises `bench.accuracy.sources.MissingError`.
        redrawn: Whether each seed draws other bags; else it only splits the same bags otherwise.
        epochs: Training budget of every method.
        val_fraction: Share of the training bags that chooses the epoch of a preset as published.
    """

    name: str
    title: str
    draw: Callable[[int], Cohort]
    redrawn: bool
    epochs: int
    val_fraction: float


def draw_fashion(
    seed: int,
    train_bags: int = 150,
    test_bags: int = 600,
    sizes: tuple[int, int] = (50, 201),
) -> Cohort:
    """Bags of 50–200 pictures, 5–10 % of which are of the class that the bag is labelled with.

    The others are neutral: quarters of four pictures of any classes put together, drawn the same
    way for every label. Labels are as frequent as 1/rank, in an order drawn by the seed, on top of
    6 training and 12 test bags each. Features are the first 64 principal components of the
    training pictures' pixels, found without labels. Training and test bags share no picture.
    """
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(seed)
    parts = fashion_pictures()
    tree = LabelTree.from_nested(GARMENTS)
    leaf = np.array([tree.leaf(name) for name in GARMENT_CLASSES])
    share = 1 / np.arange(1, 11)
    share = rng.permutation(share / share.sum())
    bags, labels = [], []
    for (pictures, classes), count, least in zip(
        parts, (train_bags, test_bags), (8, 12), strict=True
    ):
        counts = least + rng.multinomial(count - 10 * least, share)
        for k in rng.permutation(np.repeat(np.arange(10), counts)):
            n = int(rng.integers(*sizes))
            keys = max(1, round(n * rng.uniform(0.05, 0.10)))
            own = pictures[rng.choice(np.flatnonzero(leaf[classes] == k), keys)]
            four = pictures[rng.integers(len(pictures), size=(4, n - keys))]
            bags.append(np.concatenate([own, _quarters(four)]).reshape(n, -1))
            labels.append(k)
    train_x = parts[0][0].reshape(len(parts[0][0]), -1)
    pca = PCA(64, svd_solver="randomized", random_state=0).fit(train_x / np.float32(255))
    x = pca.transform(np.concatenate(bags) / np.float32(255)).astype(np.float32)
    tests = (np.arange(train_bags, len(labels)),)
    return Cohort(tree, x, _spans([len(bag) for bag in bags]), np.array(labels), tests)


def _quarters(four: np.ndarray) -> np.ndarray:
    """One picture out of four [4, n, 28, 28]: a quarter of each."""
    mixed = four[0].copy()
    mixed[:, :14, 14:] = four[1][:, :14, 14:]
    mixed[:, 14:, :14] = four[2][:, 14:, :14]
    mixed[:, 14:, 14:] = four[3][:, 14:, 14:]
    return mixed


ONE_AND_FIVE: dict[str, object] = {
    "negative": ["negative"],
    "positive": list(GARMENT_CLASSES[1:6]),
}


def draw_one_and_five(seed: int, train_bags: int = 300, test_bags: int = 600) -> Cohort:
    """Bags of neutral pictures, half of them with 2–6 % of pictures of one of five classes.

    The negative class has one leaf, the positive class five, each as frequent as the others. The
    pictures and features are made as for `draw_fashion`.
    """
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(seed)
    parts = fashion_pictures()
    tree = LabelTree.from_nested(ONE_AND_FIVE)
    bags, labels = [], []
    for (pictures, classes), count in zip(parts, (train_bags, test_bags), strict=True):
        leaves = [0] * (count // 2) + [1 + i % 5 for i in range(count - count // 2)]
        for leaf in rng.permutation(leaves):
            n = int(rng.integers(50, 201))
            keys = max(1, round(n * rng.uniform(0.02, 0.06))) if leaf else 0
            four = pictures[rng.integers(len(pictures), size=(4, n - keys))]
            own = pictures[rng.choice(np.flatnonzero(classes == leaf), keys)]
            bags.append(np.concatenate([own, _quarters(four)]).reshape(n, -1))
            labels.append(int(leaf))
    train_x = parts[0][0].reshape(len(parts[0][0]), -1)
    pca = PCA(64, svd_solver="randomized", random_state=0).fit(train_x / np.float32(255))
    x = pca.transform(np.concatenate(bags) / np.float32(255)).astype(np.float32)
    tests = (np.arange(train_bags, len(labels)),)
    return Cohort(tree, x, _spans([len(bag) for bag in bags]), np.array(labels), tests)


def draw_pcam(seed: int, train_slides: int = 160, test_slides: int = 400) -> Cohort:
    """Slides of 48 lymph-node tiles, labelled by how many of them are tumour.

    Each seed deals the tiles anew: 60 % make the training slides, the others the test slides; a
    tile may lie on several slides of its part. Features are the embedded encoder's.
    """
    features, tumour = pcam_features()
    rng = np.random.default_rng(seed)
    tree = LabelTree.from_nested(TUMOUR)
    order = rng.permutation(len(tumour))
    cut = int(0.6 * len(order))
    rows, labels = [], []
    for tiles, count in ((order[:cut], train_slides), (order[cut:], test_slides)):
        slides = [name for name, (share, _) in BURDEN.items() for _ in range(round(share * count))]
        for i in rng.permutation(len(slides)):
            sick = int(rng.integers(*BURDEN[slides[i]][1]))
            rows.append(rng.choice(tiles[tumour[tiles]], sick, replace=False))
            rows.append(rng.choice(tiles[~tumour[tiles]], SLIDE_TILES - sick, replace=False))
            labels.append(tree.leaf(slides[i]))
    tests = (np.arange(len(labels) - test_slides, len(labels)),)
    bags = _spans([SLIDE_TILES] * len(labels))
    taken = np.concatenate(rows)
    return Cohort(
        tree, features[taken], bags, np.array(labels), tests, tumour=tumour[taken].astype(bool)
    )


def draw_classic(seed: int, file: str) -> Cohort:
    """A classic binary set in 10 stratified folds."""
    from sklearn.model_selection import StratifiedKFold

    x, bags, y = classic_bags(file)
    folds = StratifiedKFold(10, shuffle=True, random_state=seed).split(y, y)
    tree = LabelTree.from_nested(["negative", "positive"])
    return Cohort(tree, x, bags, y, tuple(test for _, test in folds), mixed_units=True)


def _spans(lengths: list[int]) -> Ints:
    counts = np.array(lengths, dtype=np.int64)
    return np.stack([np.cumsum(counts) - counts, counts], axis=1)


TASKS = {
    task.name: task
    for task in (
        Task("fashion", "Fashion-MNIST bags, tree 2 > 6 > 10", draw_fashion, True, 40, 0.2),
        Task("one-and-five", "Fashion-MNIST, tree 1 + 5", draw_one_and_five, True, 40, 0.2),
        Task("pcam", "PCam slides, tree 2 > 4", draw_pcam, True, 40, 0.2),
        *(
            Task(name, title, partial(draw_classic, file=file), False, 20, 0.0)
            for name, title, file in (
                ("ucsb", "UCSB breast", "ucsb_breast_cancer"),
                ("musk1", "Musk1", "musk1"),
                ("musk2", "Musk2", "musk2"),
                ("elephant", "Elephant", "elephant"),
            )
        ),
    )
}
