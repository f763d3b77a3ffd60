"""The words that a label file may use for the parts of an official split."""

from pathlib import Path

import pytest

from hmil_fast.bags.label_file import read_labels


@pytest.mark.parametrize("word", ["val", "valid", "Validation", "validation set"])
def test_it_takes_the_words_for_validation_that_split_files_take(tmp_path: Path, word: str) -> None:
    (tmp_path / "tree.yaml").write_text("benign: [N]\nmalignant: [IC]\n")
    (tmp_path / "labels.csv").write_text(
        f"slide_id,label,split\na,N,train\nb,IC,train\nc,N,{word}\nd,IC,test\n"
    )
    slides = read_labels(tmp_path / "labels.csv", tmp_path / "tree.yaml")
    assert [slide.split for slide in slides] == ["train", "train", "val", "test"]
