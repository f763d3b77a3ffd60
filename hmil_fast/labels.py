"""LabelTree: the tree of diagnoses, its levels, parents and leaves."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from hmil_fast.errors import UsageError
from hmil_fast.tables import read_text

# a YAML file must not make us allocate at will
_MAX_NODES = 10_000
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class LabelTree:
    """A label tree whose every leaf lies at the same depth.

    A leaf that the file places higher is repeated down to the last level (a single-child chain), so
    a slide has exactly one label per level.

    Attributes:
        names: Per level, coarse first, the node names. ``names[-1]`` are the leaves.
        parents: Per level below the first, the index of each node's parent on the level above;
            ``parents[l - 1][k]`` is the parent of node k of level l.
    """

    names: tuple[tuple[str, ...], ...]
    parents: tuple[tuple[int, ...], ...]

    @property
    def num_levels(self) -> int:
        """Number of levels L ≥ 1, the root not counted."""
        return len(self.names)

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Number of nodes per level, coarse first."""
        return tuple(len(level) for level in self.names)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the leaves, in the order of the file."""
        return self.names[-1]

    @cached_property
    def nodes(self) -> tuple[tuple[int, int], ...]:
        """The distinct nodes as (level, index), a parent before its children, as the file reads.

        A node and its only child hold the same slides, so a chain of only children is one node.
        The deepest of the chain stands for it.
        """
        paths = self.ancestors().T.tolist()
        return tuple(
            dict.fromkeys(self.node(level, k) for path in paths for level, k in enumerate(path))
        )

    def node(self, level: int, index: int) -> tuple[int, int]:
        """The entry of `nodes` that stands for a node, as (level, index)."""
        return self._ends[level][index]

    @cached_property
    def _ends(self) -> list[list[tuple[int, int]]]:
        """Per level and node the deepest node of its chain of only children."""
        ends = [[(self.num_levels - 1, k) for k in range(len(self.leaves))]]
        for level in reversed(range(self.num_levels - 1)):
            children = Counter(self.parents[level])
            row = [(level, k) for k in range(len(self.names[level]))]
            for child, parent in enumerate(self.parents[level]):
                if children[parent] == 1:
                    row[parent] = ends[0][child]
            ends.insert(0, row)
        return ends

    def title(self, level: int, index: int) -> str:
        """The names along the chain of only children around a node, for instance `benign > PB`.

        A name that is repeated is given once, so the title of most nodes is their name.
        """
        level, index = self.node(level, index)
        chain = [self.names[level][index]]
        for above in range(level - 1, -1, -1):
            index = self.parents[above][index]
            if self.node(above, index)[0] != level:
                break
            chain.append(self.names[above][index])
        return " > ".join(dict.fromkeys(reversed(chain)))

    def leaf(self, label: str) -> int:
        """Index of a leaf by its name, or by that of a node with one leaf below it.

        Raises:
            UsageError: The label is no node of this tree, or an inner node with several leaves.
        """
        leaf = int(self.path(label)[-1])
        if leaf < 0:
            raise UsageError(
                f"label {label!r} is an inner node of the tree, not a leaf (leaves below it: "
                f"{', '.join(self.below(label))})",
                "write one of these leaves",
            )
        return leaf

    def path(self, label: str) -> NDArray[np.int64]:
        """The node of every level that a label names, leaf or inner node.

        Returns:
            int64 [L], coarse first; -1 on the levels below an inner node that has several nodes
            there. An only child is known from its parent.

        Raises:
            UsageError: The label is no node of this tree.
        """
        for level in reversed(range(self.num_levels)):
            if label in self.names[level]:
                break
        else:
            raise UsageError(
                f"label {label!r} is not a leaf of the tree (leaves: {', '.join(self.leaves)})",
                "correct the label, or add the leaf to the tree file",
            )
        nodes = self.ancestors()
        nodes = nodes[:, nodes[level] == self.names[level].index(label)]
        return np.where((nodes == nodes[:, :1]).all(axis=1), nodes[:, 0], -1)

    def below(self, label: str) -> tuple[str, ...]:
        """Names of the leaves below a node, or of the leaf itself, in the order of the file.

        Raises:
            UsageError: The label is no node of this tree.
        """
        path = self.path(label)
        known = path >= 0
        leaves = (self.ancestors()[known] == path[known, None]).all(axis=0)
        return tuple(name for name, under in zip(self.leaves, leaves, strict=True) if under)

    def ancestors(self) -> NDArray[np.int64]:
        """The node of every leaf on every level, int64 [L, num_leaves]; the last row is 0..n-1."""
        rows = [np.arange(len(self.leaves))]
        for parent in reversed(self.parents):
            rows.append(np.asarray(parent, dtype=np.int64)[rows[-1]])
        return np.stack(rows[::-1]).astype(np.int64)

    def heights(self) -> NDArray[np.int64]:
        """Edges from the node of every leaf on every level down to the lowest leaf below it.

        A leaf that is repeated down to the last level has height 0 wherever it stands.

        Returns:
            int64 [L, num_leaves], in the order of `ancestors`.
        """
        up = self.ancestors()
        paths = np.stack(
            [np.asarray(names)[nodes] for names, nodes in zip(self.names, up, strict=True)]
        )
        # how often the leaf's own name stands at the end of its path
        repeats = np.cumprod(paths[::-1] == paths[-1], axis=0).sum(axis=0)
        rows = []
        for level, nodes in enumerate(up):
            height = np.zeros(self.num_classes[level], dtype=np.int64)
            np.maximum.at(height, nodes, self.num_levels - repeats - level)
            rows.append(height[nodes])
        return np.stack(rows)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, read back by `from_dict`."""
        return {
            "names": [list(n) for n in self.names],
            "parents": [list(p) for p in self.parents],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LabelTree":
        """The tree that `to_dict` wrote."""
        return cls(
            tuple(tuple(level) for level in data["names"]),
            tuple(tuple(level) for level in data["parents"]),
        )

    @classmethod
    def from_nested(cls, nested: object, source: str = "the label tree") -> "LabelTree":
        """Build a tree from nested mappings; a leaf is a list entry or a key without a value.

        Names that hold all the others (`diagnosis: {benign: …, malignant: …}`) are the root, which
        is no level: a level of one node tells no slide from another.

        Raises:
            UsageError: The tree is empty, or a name is no text, stands below itself or twice.
        """
        paths = list(_leaf_paths(nested, (), source))
        if not paths:
            raise UsageError(f"{source} has no leaves", "name at least two labels in it")
        if len(paths) < 2:
            raise UsageError(f"{source} has one leaf only ({paths[0][-1]!r})", "name at least two")
        _check_names(paths, source)
        while len({path[0] for path in paths}) == 1:
            paths = [path[1:] for path in paths]
        depth = max(len(path) for path in paths)
        # a leaf placed higher is repeated: (a,) becomes (a, a, a)
        chains = [path + (path[-1],) * (depth - len(path)) for path in paths]
        names: list[tuple[str, ...]] = []
        parents: list[tuple[int, ...]] = []
        above: dict[tuple[str, ...], int] = {}
        for level in range(1, depth + 1):
            nodes = list(dict.fromkeys(chain[:level] for chain in chains))
            if level > 1:
                parents.append(tuple(above[node[:-1]] for node in nodes))
            names.append(tuple(node[-1] for node in nodes))
            above = {node: k for k, node in enumerate(nodes)}
        return cls(tuple(names), tuple(parents))

    @classmethod
    def from_yaml(cls, path: Path) -> "LabelTree":
        """Read a tree from a YAML file of nested mappings whose leaves are the labels.

        Raises:
            UsageError: The file is missing, no YAML, or no tree.
        """
        text = read_text(path, limit=_MAX_BYTES)
        try:
            nested = _Loader(text).get_single_data()
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f" line {mark.line + 1}" if mark else ""
            said = [getattr(error, part, None) for part in ("context", "problem")]
            raise UsageError(
                f"{path}{line} is not valid YAML: {', '.join(filter(None, said)) or error}",
                "write each node on a line of its own as `name:`, and what is below it indented "
                "with spaces; quote a name that holds a colon or a comma",
            ) from None
        return cls.from_nested(nested, str(path))


@dataclass(frozen=True)
class _NotText:
    """What YAML takes for a number, a date, a truth value or nothing, as it is written."""

    written: str
    kind: str


# None where nothing is written, which is how a leaf is written as a key
_KINDS = {"bool": "yes or no", "int": "a number", "float": "a number", "timestamp": "a date",
          "null": "no value", "value": "a sign"}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases, whose expansion has no bound, and without keys lost in silence."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = _KINDS.get(node.tag.removeprefix("tag:yaml.org,2002:"))
        if not isinstance(node, yaml.ScalarNode) or kind is None:
            return super().construct_object(node, deep)
        return _NotText(node.value, kind) if node.value else None

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "a label tree takes no aliases (*)", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _leaf_paths(nested: object, path: tuple[str, ...], source: str) -> Sequence[tuple[str, ...]]:
    if len(path) > 32:
        raise UsageError(f"{source} is deeper than 32 levels, or refers to itself", "flatten it")
    if path and (nested is None or (isinstance(nested, _NotText) and nested.kind == "no value")):
        return [path]
    if isinstance(nested, dict):
        items = list(nested.items())
    elif isinstance(nested, list):
        items = [pair for entry in nested for pair in _list_entry(entry)]
    # `positive: tumour` is a single-child chain
    elif isinstance(nested, _NotText) or (path and isinstance(nested, str)):
        items = [(nested, None)]
    else:
        raise UsageError(
            f"{source}: {'/'.join(path) or 'the root'} is {_in_words(nested)}",
            "write nested mappings, for instance `positive: {micro: , macro: }`",
        )
    if path and not items:
        raise UsageError(
            f"{source}: {'/'.join(path)} has no leaves", "name some, or write no value"
        )
    paths: list[tuple[str, ...]] = []
    for name, below in items:
        if not isinstance(name, str) or not name.strip():
            raise _not_a_name(name, path, source)
        paths += _leaf_paths(below, (*path, unicodedata.normalize("NFC", name.strip())), source)
        if len(paths) > _MAX_NODES:
            raise UsageError(f"{source} has more than {_MAX_NODES} leaves", "shrink it")
    return paths


def _in_words(nested: object) -> str:
    return "empty" if nested is None else f"a {type(nested).__name__}"


def _not_a_name(name: object, path: tuple[str, ...], source: str) -> UsageError:
    where = f"below {'/'.join(path) or 'the root'}"
    if isinstance(name, _NotText):
        written = name.written[:200]
        return UsageError(
            f"{source}: {written} {where} is {name.kind} in YAML, not a name",
            f'put it in quotes: "{written}"',
        )
    if isinstance(name, str) or name is None:
        return UsageError(f"{source}: a name {where} is empty", "write it, or drop the entry")
    return UsageError(
        f"{source}: an entry {where} is {_in_words(name)}, not a name",
        "write `name: [a, b]` for a node with nodes below it",
    )


def _check_names(paths: Sequence[tuple[str, ...]], source: str) -> None:
    """Every name stands for one node; a leaf may be written more than once along its own path."""
    children: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for path in paths:
        for level in range(len(path)):
            children[path[:level]].add(path[level])
    for path, count in Counter(paths).items():
        if count > 1 or children[path]:
            raise UsageError(
                f"{source} has {path[-1]!r} twice below {'/'.join(path[:-1]) or 'the root'}",
                "drop one of them",
            )
    place: dict[str, tuple[str, ...]] = {}
    for path in dict.fromkeys(leaf[: level + 1] for leaf in paths for level in range(len(leaf))):
        name, above = path[-1], path[:-1]
        known = place.setdefault(name, path)
        repeated = known == above and children[above] == {name} and children[path] <= {name}
        if repeated:
            place[name] = path
        elif known != path:
            here, there = "/".join(path), "/".join(known)
            how = f"below itself: {here}" if name in above else f"twice: {there} and {here}"
            raise UsageError(
                f"{source} has {name!r} {how}",
                "rename one, or drop it; only a node's single child may repeat its name",
            )


def _list_entry(entry: object) -> list[tuple[object, object]]:
    return list(entry.items()) if isinstance(entry, dict) else [(entry, None)]
