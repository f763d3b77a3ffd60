"""Extraction from tiles that are decoded on the device: a CPU stands for it, by the same lines."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import tifffile
import torch

import hmil_fast
from hmil_fast.errors import UsageError
from hmil_fast.extraction.decode_choice import by_rates, chosen_codecs, encoder_rate
from hmil_fast.extraction.encoders import Encoder
from hmil_fast.extraction.pipeline.extractor import Extractor, store_spec
from hmil_fast.extraction.slides import SlideTask
from hmil_fast.io.slide.device_decoder import DeviceDecoder, Slots
from hmil_fast.io.slide.sources import Unsuited, load_nvimgcodec
from hmil_fast.io.slide.tiff_facts import TiffLevel
from hmil_fast.io.store import FeatureStore, create_store, open_store
from hmil_fast.io.tiles.grid import TileSpec

try:
    load_nvimgcodec()
except Unsuited:
    pytest.skip("nvImageCodec is not installed", allow_module_level=True)
SlideFile = Callable[[str], Path]
Cli = Callable[..., "CompletedProcess[str]"]
CPU = torch.device("cpu")
ON_CPU = TileSpec(mpp=0.5, min_tissue=0, coarser=(4.0,))
ON_GPU = replace(ON_CPU, gpu_decoded=("jpeg", "jpeg2000"))


@pytest.fixture
def tasks(slide_file: SlideFile, tmp_path: Path) -> list[SlideTask]:
    """RGB and YCbCr in JPEG, JPEG 2000, uncompressed; one with a tile of noise; at two scales."""
    source = slide_file("cmu1_small_pyramid.tif")
    with tifffile.TiffFile(source) as file:
        page = file.pages[0]
        start, count = page.dataoffsets[49], page.databytecounts[49]
    raw = bytearray(source.read_bytes())
    noise = np.random.default_rng(3).integers(0, 256, count - count // 4, np.uint8)
    raw[start + count // 4 : start + count] = noise.tobytes()
    (hurt := tmp_path / "hurt.tif").write_bytes(raw)
    tifffile.imwrite(plain := tmp_path / "plain.tif", np.full((600, 700, 3), 120, np.uint8),
                     tile=(256, 256), photometric="rgb")  # fmt: skip
    paths = [slide_file("CMU-1-Small-Region.svs"), source, slide_file("cmu1_jpeg2000.svs")]
    return [SlideTask(path.stem, path, 0.5) for path in (*paths, hurt, plain)]


def extract(
    path: Path, encoder: Encoder, tasks: list[SlideTask], spec: TileSpec
) -> tuple[FeatureStore, dict[str, int]]:
    store = create_store(path, store_spec(encoder, spec, "float32"))
    decoder = DeviceDecoder(CPU) if spec.gpu_decoded else None
    extractor = Extractor(store, encoder, spec, batch=8, threads=3, decoder=decoder)
    results = list(extractor.run(tasks, lambda task, done, total: None))
    assert [result.error for result in results] == [None] * len(tasks)
    return store, {result.slide_id: result.bad_tiles for result in results}


def test_features_status_and_pictures_are_those_of_the_host(
    tmp_path: Path, encoder: Encoder, tasks: list[SlideTask]
) -> None:
    host, bad = extract(tmp_path / "host", encoder, tasks, ON_CPU)
    there, bad_there = extract(tmp_path / "device", encoder, tasks, ON_GPU)
    assert bad == bad_there
    assert bad["hurt"] > 0
    for task in tasks:
        name = task.slide_id
        assert np.array_equal(host.features(name), there.features(name))
        assert np.array_equal(host.status(name), there.status(name))
        sheets = (store.path / "contact-sheets" / f"{name}.jpg" for store in (host, there))
        first, second = (Path(str(sheet)).read_bytes() for sheet in sheets)
        assert first == second
        assert "decoded" not in host.record(name).attrs
    decoded = {task.slide_id: there.record(task.slide_id).attrs.get("decoded") for task in tasks}
    assert decoded["plain"] is None, "no codec that a GPU decodes"
    assert decoded["hurt"]["tiles_on_cpu"] == 0
    for name in ("CMU-1-Small-Region", "cmu1_jpeg2000"):
        assert decoded[name] == {
            "on": "gpu", "by": "nvImageCodec on the CPU", "probe_difference": 0.0,
            "tiles_on_cpu": 0,
        }  # fmt: skip
    assert there.spec.tiling["gpu_decoded"] == ["jpeg", "jpeg2000"]


class Shifting(DeviceDecoder):
    """A decoder with other colours."""

    def decode(
        self, facts: TiffLevel, data: Sequence[bytes], slots: Slots, places: Sequence[int]
    ) -> list[bool]:
        done = super().decode(facts, data, slots, places)
        slots.pixels[list(places)] = slots.pixels[list(places)].flip(-1)
        return done


def test_a_slide_that_the_device_decodes_otherwise_is_decoded_by_a_cpu(
    tmp_path: Path, encoder: Encoder, tasks: list[SlideTask]
) -> None:
    host, _ = extract(tmp_path / "host", encoder, tasks[:1], ON_CPU)
    store = create_store(tmp_path / "there", store_spec(encoder, ON_GPU, "float32"))
    extractor = Extractor(store, encoder, ON_GPU, batch=8, decoder=Shifting(CPU))
    (result,) = extractor.run(tasks[:1], lambda task, done, total: None)
    assert result.error is None
    assert any("a CPU decoded it: nvImageCodec" in what for what, _ in result.notes)
    name = tasks[0].slide_id
    assert np.array_equal(store.features(name), host.features(name))
    decoded = store.record(name).attrs["decoded"]
    assert decoded["on"] == "cpu"
    assert "decodes its tiles otherwise" in decoded["because"]


def test_a_store_for_a_gpu_is_refused_on_a_cpu(tmp_path: Path, encoder: Encoder) -> None:
    store = create_store(tmp_path / "store", store_spec(encoder, ON_GPU, "float32"))
    with pytest.raises(UsageError, match="decoded by a GPU, not on cpu"):
        Extractor(store, encoder, ON_GPU)


def test_the_choice_is_fixed_with_the_store(encoder: Encoder) -> None:
    tasks = [SlideTask("a", Path("a.svs"))]

    def choose(decode: str, stored: list[str] | None, tasks: list[SlideTask] = tasks) -> object:
        return chosen_codecs(decode, tasks, encoder, ["cpu"], stored)

    assert choose("auto", None) == ()
    assert choose("auto", ["jpeg2000"]) == ("jpeg2000",)
    assert choose("auto", []) == ()
    assert choose("gpu", None) == ("jpeg", "jpeg2000")
    assert choose("cpu", ["jpeg"]) == ()
    named = [SlideTask("a", Path("a.svs"), reader="openslide")]
    assert choose("auto", None, named) == ()
    with pytest.raises(UsageError, match="CPU reader 'openslide' was asked for"):
        choose("gpu", None, named)
    with pytest.raises(UsageError, match="choose one of auto, cpu, gpu"):
        choose("tpu", None)


def test_what_a_gpu_decodes_by_the_rates(encoder: Encoder) -> None:
    assert by_rates(cores=16, tiles_per_s=3_000) == ("jpeg2000",)
    assert by_rates(cores=2, tiles_per_s=20_000) == ("jpeg", "jpeg2000")
    a100, h200 = encoder_rate(encoder, 108, 80), encoder_rate(encoder, 132, 90)
    assert 1 < h200 / a100 < 4
    assert encoder_rate(encoder, 108, 81) == a100  # an unknown one counts as the one before it


def test_the_command_line(cli: Cli, tmp_path: Path, slide_file: SlideFile) -> None:
    slide, store = slide_file("cmu1_small_pyramid.tif"), tmp_path / "store"
    asked = ("extract", slide, "--store", store, "--slide-mpp", 0.5, "--mpp", 4, "--min-tissue", 0)
    refused = cli(*asked, "--decode", "gpu", "--device", "cpu")
    assert refused.returncode == 2
    said = " ".join(refused.stderr.split())
    assert "decoded by a GPU, not on cpu" in said
    assert "--decode cpu" in said
    assert cli(*asked).returncode == 0
    assert "gpu_decoded" not in open_store(store).spec.tiling


def test_software_is_named_where_hmil_fast_is_not_installed(tmp_path: Path) -> None:
    """A process that finds all packages but ours, as with a checkout on the path alone."""
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if not entry.name.startswith(("hmil_fast", "__editable__")):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "hmil_fast").symlink_to(Path(hmil_fast.__file__).parent)
    code = (
        "import importlib.metadata as metadata, json, torch\n"
        "from hmil_fast.extraction.pipeline.attributes import software\n"
        "assert not list(metadata.distributions(name='hmil-fast'))\n"
        "print(json.dumps(software(torch.device('cpu'))))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    named = json.loads(done.stdout)
    assert named["hmil-fast"] == hmil_fast.__version__
    assert {"torch", "timm", "zarr", "nvimgcodec"} <= named.keys()
