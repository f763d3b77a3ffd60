"""Settings: where they come from, which wins, and what is said of those that cannot be."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmil_fast.config import PRESETS, Recipe, Runtime, TrainConfig, load_config, load_runtime
from hmil_fast.errors import UsageError
from hmil_fast.settings import settings_of


def test_words_and_flags_win_over_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("epochs: 10\nlr: 1e-2\nfolds: 4\npreset: released\n")
    config = load_config(
        file, ["lr=1e-3", "batch_bags=1e2"], {"folds": 3, "seed": 7, "model": None}
    )
    recipe = dataclasses.replace(PRESETS["released"], epochs=10, lr=1e-3, batch_bags=100)
    assert config == TrainConfig(recipe, folds=3, seed=7)
    assert load_config(file, ["folds=9"]).folds == 9
    assert load_config(None) == TrainConfig()


def test_a_flag_and_a_word_that_contradict_are_both_named() -> None:
    with pytest.raises(UsageError, match=r"--mpp 1\.944 and 'mpp=0\.972' are both given"):
        load_config(None, ["mpp=0.972"], {"mpp": 1.944})
    assert load_config(None, ["mpp=2", "folds=9"], {"mpp": 2.0, "folds": None}).mpp == 2


def test_the_scales_that_can_be_asked_for_are_quoted() -> None:
    with pytest.raises(UsageError, match="setting scales is 'foo'") as error:
        load_config(None, ["scales=foo"])
    assert '"one"' in error.value.fix
    assert '"all" without mpp' in error.value.fix
    with pytest.raises(UsageError, match=r"mpp=1\.944 and scales=all contradict"):
        load_config(None, ["scales=all"], {"mpp": 1.944})


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n"])
def test_an_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert load_config(tmp_path / "c.yaml") == TrainConfig()


@given(
    st.builds(
        TrainConfig,
        recipe=st.builds(
            Recipe,
            model=st.sampled_from(["hmil", "flat", "mean"]),
            lr=st.floats(1e-12, 1e3),
            weight_decay=st.floats(0, 1),
            dropout=st.floats(0, 0.99),
            batch_instances=st.integers(1, 2**40),
            tau=st.floats(1e-3, 10),
            hierarchy=st.sampled_from(["ce", "hxe"]),
            supcon_memory=st.integers(0, 64),
        ),
        seed=st.integers(0, 2**31 - 1),
        val_fraction=st.floats(1e-6, 0.5),
    )
)
def test_settings_come_back_from_yaml_as_they_were(config: TrainConfig) -> None:
    import yaml

    words = [f"{k}={v}" for k, v in yaml.safe_load(config.to_yaml()).items()]
    assert load_config(None, words) == config


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("lr=fast", "a number"),
        ("lr=[1", "a number"),
        ("lr={a: 1}", "a number"),
        ("lr=yes", "a number"),
        ("lr=0", "a positive number"),
        ("lr=.inf", "a positive number"),
        ("lr=nan", "a positive number"),
        ("epochs=2.5", "a whole number"),
        ("epochs=", "a whole number"),
        ("epochs=1e400", "a whole number"),
        ("epochs=true", "a whole number"),
        ("epochs=0", "at least 1"),
        ("folds=1", "at least 2"),
        ("seed=-1", "0 to 2147483647"),
        ("seed=1e12", "0 to 2147483647"),
        ("hidden=1000000000", "1 to 65536"),
        ("dropout=1", "less than 1"),
        ("val_fraction=0.6", "at most 0.5"),
        ("val_fraction=0", "at most 0.5"),
        ("model=unet", "one of hmil, flat"),
        ("model=", "text"),
        ("baseline=null", "text"),
        ("preset=worst", "one of best, paper, released"),
        ("preset=null", "text"),
        ("hierarchy=flat", "one of ce, marginal, hxe, soft"),
        ("hierarchy=3", "text"),
        ("coarse=mean", "one of head, sum"),
        ("supcon_memory=2.5", "a whole number"),
        ("supcon_memory=-1", "0 to 65536"),
        ("tau=hot", "a number"),
        ("tau=0", "a positive number"),
        ("label_smoothing=1", "less than 1"),
        ("device=0", "text"),
        ("cache=ram", "one of auto, device, host"),
        ("precision=fp8", "one of auto, fp32, bf16"),
        ("threads=-1", "0 to 4096"),
        ("feature_dropout=0.999", "0.002 to 0.998"),
        ("feature_dropout=0.001", "0.002 to 0.998"),
        ("patience=-3", "at least 1"),
    ],
)
def test_a_bad_value_names_the_setting_and_the_fix(tmp_path: Path, word: str, fix: str) -> None:
    name, _, text = word.partition("=")
    with pytest.raises(UsageError, match=f"^setting {name} is ") as error:
        _ = load_config(None, [word]), load_runtime(None, [word])
    assert fix in error.value.fix
    if text != "[1":  # no YAML at all
        (tmp_path / "c.yaml").write_text(f"{name}: {text}")
        with pytest.raises(UsageError, match=f"^setting {name} is "):
            _ = load_config(tmp_path / "c.yaml"), load_runtime(tmp_path / "c.yaml")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_overridden_one_setting_at_a_time(preset: str, tmp_path: Path) -> None:
    assert load_config(None, [f"preset={preset}"]).recipe == PRESETS[preset]
    words = ["tau=0.5", "hierarchy=hxe", "ham=preset", "coarse_weight=null"]
    config = load_config(None, words, {"preset": preset})
    assert config.recipe == dataclasses.replace(PRESETS[preset], tau=0.5, hierarchy="hxe")
    assert config.recipe.preset == preset
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("preset", PRESETS)
def test_the_model_flat_has_no_term_of_the_levels_above(preset: str) -> None:
    given = load_config(None, ["model=flat", f"preset={preset}"]).recipe
    assert dataclasses.replace(given, model="hmil") == PRESETS[preset]
    recipe = given.loss_terms()
    assert PRESETS[preset].loss_terms() == PRESETS[preset]
    assert (recipe.hierarchy, recipe.coarse_weight, recipe.hba, recipe.ham) == (
        "ce", 0.0, "none", "none",
    )  # fmt: skip
    assert recipe.supcon in ("leaf", "released")
    assert given.preset == preset


def test_every_setting_has_one_name_and_is_described() -> None:
    names = [s.name for kind in (Recipe, TrainConfig, Runtime) for s in settings_of(kind)]
    assert len(names) == len(set(names)) > 40
    assert set(names) == {*TrainConfig().values(), *dataclasses.asdict(Runtime())}
    for kind in (Recipe, TrainConfig, Runtime):
        for setting in settings_of(kind):
            assert setting.text.endswith(".")
            assert all(map(setting.allowed.accepts, setting.defaults)), setting.name


def test_the_runtime_is_read_from_the_same_words_and_is_no_part_of_the_config() -> None:
    words = ["device=cpu", "cache=stream", "lr=1e-3"]
    assert load_runtime(None, words) == Runtime("cpu", "stream")
    assert load_config(None, words) == load_config(None, ["lr=1e-3"])


def test_settings_that_do_not_go_together_are_named() -> None:
    with pytest.raises(UsageError, match="supcon_memory is 8") as error:
        load_config(None, ["supcon=released"], {"preset": "best"})
    assert "give 0 with supcon=released" in error.value.fix


def test_unknown_settings_and_words_without_value() -> None:
    with pytest.raises(UsageError, match="unknown setting 'learning_rate'") as error:
        load_config(None, ["learning_rate=1"])
    assert "lr" in error.value.fix
    with pytest.raises(UsageError, match="'lr' is not of the form key=value"):
        load_config(None, ["lr"])
    with pytest.raises(UsageError, match="'hirarchy'; did you mean hierarchy"):
        load_config(None, ["hirarchy=hxe"])
    with pytest.raises(UsageError, match=r"balance is 'yes'(.|\n)*choose one of none, leaf"):
        load_config(None, ["balance=yes"])
    with pytest.raises(UsageError, match="unknown setting ''"):
        load_config(None, ["=3"])


@pytest.mark.parametrize(
    "data",
    [
        b"- epochs\n",
        b"epochs\n",
        b"lr: [\n",
        b"\xff\xfe\x00",
        b"[" * 5000,
        b"lr: 2024-13-45\n",
        b"1: 2\n",
        b"? [a]\n: 1\n",
        b"lr: !!python/object/apply:os.system [exit]\n",
    ],
)
def test_files_that_hold_no_settings_are_named(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(data)
    with pytest.raises(UsageError, match=re.escape(str(file)) + "|setting"):
        load_config(file)
    with pytest.raises(UsageError, match=re.escape(str(file))):
        load_config(file / "below")


def test_a_file_of_references_cannot_fill_the_message(tmp_path: Path) -> None:
    lines = [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "c.yaml").write_text("\n".join(["lr:", "- &a0 [x]", *lines]))
    with pytest.raises(UsageError, match="setting lr is") as error:
        load_config(tmp_path / "c.yaml")
    assert len(str(error.value)) < 1000


def test_the_fingerprint_tells_any_two_settings_apart() -> None:
    changes: dict[str, Any] = {
        "model": "mean", "baseline": "none", "folds": 3, "mpp": 2.0,
        "scales": "all", "views": 2, "seed": 1,
        "epochs": 9, "patience": 9, "lr": 0.5, "weight_decay": 0.5, "batch_bags": 9,
        "batch_instances": 9, "hidden": 9, "dropout": 0.5, "val_fraction": 0.5, "balance": "leaf",
        "standardise": "none",
        "hierarchy": "hxe", "hxe_alpha": 0.9, "soft_beta": 9.0, "coarse": "head",
        "readout": "paper", "instance_dropout": 0.9, "feature_dropout": 0.9, "label_smoothing": 0.9,
        "lr_schedule": "constant", "warmup": 0.9, "ema": 0.9,
        "class_weights": "none", "curriculum": "linear",
        "coarse_weight": 0.9, "hba": "nll", "hba_weight": 0.9, "ham": "mean", "ham_weight": 0.9,
        "supcon": "leaf", "supcon_weight": 0.9, "tau": 0.9, "supcon_memory": 9,
    }  # fmt: skip
    assert changes.keys() == TrainConfig().values().keys()
    prints = {load_config(None, [f"{k}={v}"]).fingerprint() for k, v in changes.items()}
    assert len(prints | {TrainConfig().fingerprint()}) == len(changes) + 1
