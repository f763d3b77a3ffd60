from pathlib import Path

import numpy as np
import pytest

from hmil_fast.errors import UsageError
from hmil_fast.labels import LabelTree

BRACS = """
benign: [N, PB, UDH]
atypical: [FEA, ADH]
malignant: [DCIS, IC]
"""


def _tree(tmp_path: Path, text: str) -> LabelTree:
    path = tmp_path / "tree.yaml"
    path.write_text(text, encoding="utf-8")
    return LabelTree.from_yaml(path)


def test_two_levels(tmp_path: Path) -> None:
    tree = _tree(tmp_path, BRACS)
    assert tree.num_levels == 2
    assert tree.num_classes == (3, 7)
    assert tree.leaves == ("N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC")
    assert tree.parents == ((0, 0, 0, 1, 1, 2, 2),)
    assert tree.leaf("ADH") == 4
    np.testing.assert_array_equal(tree.ancestors(), [[0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize("text", ["[a, b, c]", "{a: , b: , c: }"])
def test_depth_one(tmp_path: Path, text: str) -> None:
    tree = _tree(tmp_path, text)
    assert tree.num_classes == (3,)
    assert tree.parents == ()
    assert tree.ancestors().tolist() == [[0, 1, 2]]


def test_leaf_placed_higher_is_repeated_downwards(tmp_path: Path) -> None:
    tree = _tree(tmp_path, "{negative: , positive: {micro: , macro: [large, small]}}")
    assert tree.names == (
        ("negative", "positive"),
        ("negative", "micro", "macro"),
        ("negative", "micro", "large", "small"),
    )
    assert tree.parents == ((0, 1, 1), (0, 1, 2, 2))


def test_single_child_chains(tmp_path: Path) -> None:
    tree = _tree(tmp_path, "{a: {b: {c: }}, d: e}")
    assert tree.names == (("a", "d"), ("b", "e"), ("c", "e"))
    assert tree.parents == ((0, 1), (0, 1))
    assert tree.ancestors().tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    "text",
    [
        "diagnosis: {benign: [N, PB], malignant: [IC]}",
        "{slide: {diagnosis: [{benign: [N, PB]}, {malignant: IC}]}}",
        "[{any: {benign: [N, PB], malignant: [IC]}}]",
    ],
)
def test_a_root_that_holds_everything_is_no_level(tmp_path: Path, text: str) -> None:
    tree = _tree(tmp_path, text)
    assert tree == _tree(tmp_path, "{benign: [N, PB], malignant: [IC]}")
    assert tree.names == (("benign", "malignant"), ("N", "PB", "IC"))


@pytest.mark.parametrize("text", ["{a: a, b: [x, y]}", "{a: [a], b: [x, y]}", "{a: , b: [x, y]}"])
def test_a_leaf_may_be_repeated_by_hand(tmp_path: Path, text: str) -> None:
    assert _tree(tmp_path, text).names == (("a", "b"), ("a", "x", "y"))


def test_heights_are_those_of_the_tree_before_leaves_are_repeated(tmp_path: Path) -> None:
    tree = _tree(tmp_path, "{n: , p: {micro: , macro: [large, small], only: {chain: end}}}")
    assert tree.names[-1] == ("n", "micro", "large", "small", "end")
    by_hand = [[0, 3, 3, 3, 3], [0, 0, 1, 1, 2], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert tree.heights().tolist() == by_hand


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        # placed higher, repeated by hand, another name, an inner chain
        ("{neg: , pos: [micro, macro]}", ["neg", "pos", "micro", "macro"]),
        ("{neg: [neg], pos: [micro, macro]}", ["neg", "pos", "micro", "macro"]),
        ("{neg: normal, pos: [micro, macro]}", ["neg > normal", "pos", "micro", "macro"]),
        ("{a: , b: {c: {d: [e, f]}}}", ["a", "b > c > d", "e", "f"]),
        ("{a: {b: c}, d: {e: f}}", ["a > b > c", "d > e > f"]),
        ("[a, b]", ["a", "b"]),
    ],
)
def test_a_chain_of_only_children_is_one_node(tmp_path: Path, text: str, titles: list[str]) -> None:
    tree = _tree(tmp_path, text)
    assert [tree.title(*node) for node in tree.nodes] == titles
    up = tree.ancestors()
    slides = {}
    for level, names in enumerate(tree.names):
        for k in range(len(names)):
            # what stands for a node holds the same leaves, and is in the list once
            end, own = tree.node(level, k), np.flatnonzero(up[level] == k).tolist()
            assert tree.node(*end) == end
            assert np.flatnonzero(up[end[0]] == end[1]).tolist() == own
            slides[tuple(own)] = end
            assert tree.title(level, k) == tree.title(*end)
    assert sorted(slides.values()) == sorted(tree.nodes)


def test_list_entries_may_be_mappings(tmp_path: Path) -> None:
    tree = _tree(tmp_path, "[normal, {tumour: [low, high]}]")
    assert tree.names == (("normal", "tumour"), ("normal", "low", "high"))


def test_dictionary_form_comes_back(tmp_path: Path) -> None:
    tree = _tree(tmp_path, BRACS)
    assert LabelTree.from_dict(tree.to_dict()) == tree


def test_unknown_label_names_the_leaves(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"label 'udh' is not a leaf.*N, PB, UDH"):
        _tree(tmp_path, BRACS).leaf("udh")


def test_an_inner_node_names_the_levels_above_and_its_leaves(tmp_path: Path) -> None:
    tree = _tree(tmp_path, BRACS)
    assert tree.path("FEA").tolist() == [1, 3]
    assert tree.path("atypical").tolist() == [1, -1]
    assert tree.below("atypical") == ("FEA", "ADH")
    with pytest.raises(UsageError, match=r"'atypical' is an inner node .*FEA, ADH"):
        tree.leaf("atypical")
    chains = _tree(tmp_path, "{n: , p: {q: {r: [s, t]}}, u: {v: w}}")
    assert chains.path("n").tolist() == [0, 0, 0, 0]
    assert chains.path("p").tolist() == chains.path("r").tolist() == [1, 1, 1, -1]
    assert chains.path("u").tolist() == [2, 2, 2, 3]  # the only leaf below it
    assert (chains.leaf("u"), chains.below("u")) == (3, ("w",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the root is empty"),
        ("{}", "has no leaves"),
        ("[]", "has no leaves"),
        ("a: {}", "has no leaves"),
        ("{a: [], b: , c: }", "a has no leaves"),
        ("just text", "the root is a str"),
        ("[only]", "has one leaf only"),
        ("{a: {b: }}", "has one leaf only"),
        ("{a: [x, y], b: [x, z]}", "has 'x' twice: a/x and b/x"),
        ("{a: {s: [x, y]}, b: {s: [z, w]}}", "has 's' twice: a/s and b/s"),
        ("[x, y, x]", "has 'x' twice below the root"),
        ("{a: [x, y, x], b: }", "has 'x' twice below a"),
        ("[a, {a: [x, y]}]", "has 'a' twice below the root"),
        ("{a: [x, a], b: }", "has 'a' below itself: a/a"),
        ("{a: {b: {a: [x, y]}}, c: }", "has 'a' below itself: a/b/a"),
        ("{a: {a: [x, y]}, b: }", "has 'a' below itself: a/a"),
        ("{a: [b, c], b: [a, d]}", "has 'b' twice: a/b and b"),
        ("{a: [x, y], b: {z: {x: [v, w]}}}", "has 'x' twice: a/x and b/z/x"),
        ("{a: , b: }\n---\n{c: , d: }", "is not valid YAML: expected a single document"),
        ("{a: [x, 3], b: [z]}", "3 below a is a number in YAML, not a name"),
        ("{a: [x, No], b: [z]}", "No below a is yes or no in YAML, not a name"),
        ("{a: [x, ' '], b: [z]}", "a name below a is empty"),
        ("{a: 3, b: }", "3 below a is a number in YAML"),
        ("{a: [x, [y, z]], b: }", "an entry below a is a list, not a name"),
        ("{a: [x, y], a: [z, w]}", "the key 'a' occurs twice"),
        ("{a: [x", "is not valid YAML"),
        ("{[a]: b}", "is not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("a: &a {b: *a}", "takes no aliases"),
        ("{a: &a [x, y], b: {<<: *a}}", "takes no aliases"),
        ("[" * 2000, "is not valid YAML"),
        ("2024-13-45", "2024-13-45 below the root is a date in YAML"),
    ],
)
def test_bad_trees_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        _tree(tmp_path, text)
    assert "tree.yaml" in str(caught.value)
    assert len(str(caught.value)) < 1000


MISREAD = "NO yes Off 3 3:4 8500_3 010 0x1F .5 1.0 1.5e+3 .inf ~ null 2024-01-31 2024-13-45"


@pytest.mark.parametrize("name", MISREAD.split())
def test_a_name_that_yaml_takes_for_something_else_is_quoted_as_it_is_written(
    tmp_path: Path, name: str
) -> None:
    for text in ("{a: [x, %s], b: z}", "[a, %s]"):
        with pytest.raises(UsageError, match="in YAML, not a name") as caught:
            _tree(tmp_path, text % name)
        quoted = caught.value.fix.removeprefix("put it in quotes: ")
        assert quoted == f'"{name}"'
        assert name in _tree(tmp_path, text % quoted).leaves
    if name not in ("~", "null"):  # which say that a key has no value
        with pytest.raises(UsageError, match="in YAML, not a name"):
            _tree(tmp_path, f"{{a: {name}, b: z}}")
    with pytest.raises(UsageError, match="in YAML, not a name"):
        _tree(tmp_path, f"a: z\n? {name}\n: [x, y]")


def test_a_number_in_base_60_of_many_digits_is_not_worked_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a number in YAML") as caught:
        _tree(tmp_path, f"[a, {':'.join(['59'] * 200_000)}]")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_names_are_those_of_the_labels_whatever_wrote_the_file(
    tmp_path: Path, encoding: str
) -> None:
    path = tmp_path / "tree.yaml"
    path.write_bytes("' a ': [e\u0301, y]\r\nb: [z]\r\n".encode(encoding))
    assert LabelTree.from_yaml(path).names == (("a", "b"), ("\u00e9", "y", "z"))
    path.write_bytes("[\u00e9, z]".encode("cp1252"))
    with pytest.raises(UsageError, match=r"tree\.yaml is not UTF-8") as caught:
        LabelTree.from_yaml(path)
    assert caught.value.fix == "save it as UTF-8"


@pytest.mark.parametrize("seed", ["{x: , y: }", "{}"])
@pytest.mark.parametrize("item", ["n{i}: *a{k}", "? *a{k}", "<<: *a{k}"])
def test_yaml_bombs_are_refused(tmp_path: Path, seed: str, item: str) -> None:
    lines = [f"a0: &a0 {seed}"]
    for k in range(24):
        items = ", ".join(item.format(i=i, k=k) for i in range(9))
        lines.append(f"a{k + 1}: &a{k + 1} {{{items}}}")
    with pytest.raises(UsageError, match="takes no aliases"):
        _tree(tmp_path, "\n".join(lines))


def test_size_is_limited(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than 10000 leaves"):
        _tree(tmp_path, "\n".join(f"- leaf{k}" for k in range(10_001)))
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        _tree(tmp_path, "#" * (1 << 21))
    assert len(_tree(tmp_path, "\n".join(f"- leaf{k}" for k in range(2_000))).leaves) == 2_000


def test_mapping_that_holds_itself_is_refused() -> None:
    nested: dict[str, object] = {}
    nested["a"] = nested
    with pytest.raises(UsageError, match="deeper than 32 levels, or refers to itself"):
        LabelTree.from_nested(nested)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none\.yaml"):
        LabelTree.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match=r"bin\.yaml"):
        LabelTree.from_yaml(tmp_path / "bin.yaml")
