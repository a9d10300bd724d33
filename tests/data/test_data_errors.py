"""What can be wrong with data: each is one sentence that names the file, through the command line as it is typed."""

import json
import shutil
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, refuse, succeed
from safetensors.torch import save_file
from written import add, as_edm_tree, as_folder, as_parquet, as_tar, as_zip, png

from fewstep.data.config import FolderConfig
from fewstep.data.load import load_data

SQUARE = png(np.zeros((1, 8, 8), np.uint8))
YAML = """
name: own
data: {{kind: {kind}, path: "{path}"}}
student: {{kind: velocity, init: scratch, network: {{kind: mlp, width: 8, depth: 1}}}}
objective: {{kind: flow_matching}}
train: {{steps: 2, batch_size: 16}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return as_folder(tmp_path / "digits")


def everywhere(kind: str, path: Path, says: tuple[str, ...], code: int = 2) -> None:
    """Both looking at the data and training on them meet the same sentence."""
    file = path.parent / "own.yaml"
    file.write_text(YAML.format(kind=kind, path=path))
    said = [
        refuse("data", "inspect", file, says=says, code=code),
        refuse("teach", file, "--out", path.parent / "run", says=says, code=code),
        refuse("data", "prepare", file, "--out", path.parent / "shards", says=says, code=code),
    ]
    # The data commands add what the key is called among their own options.
    assert len({line.partition(" (here: ")[0] for line in said}) == 1
    assert not (path.parent / "run").exists()
    assert not (path.parent / "shards").exists()


# Images --------------------------------------------------------------------------------------------------------------


def test_a_broken_image(folder: Path) -> None:
    file = sorted((folder / "4").iterdir())[3]
    file.write_bytes(file.read_bytes()[:50])
    everywhere("folder", folder, (f"{file} does not decode", "data.skip_broken=true"))


def test_the_first_of_several_faults_is_named(folder: Path) -> None:
    """In the order of the data, whichever thread comes to it first."""
    for name in ("9", "2", "5"):
        sorted((folder / name).iterdir())[-1].write_bytes(b"")
    refuse("data", "inspect", folder, says=(str(sorted((folder / "2").iterdir())[-1]),))


@pytest.mark.parametrize("write", [as_folder, as_edm_tree, as_zip, as_parquet, as_tar])
def test_broken_images_can_be_left_out_and_are_counted(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """What remains is what it was; the names are told on stderr and kept with the data."""
    path = write(tmp_path / "data")
    broken = _break(path)
    said = refuse("data", "inspect", path, says=(broken,))
    found = succeed("data", "inspect", path, "--skip-broken", "--json")
    document = json.loads(found.stdout)
    assert document["count"] == 299
    assert document["skipped"] == [broken]
    assert "1 left out" in found.stderr
    out = tmp_path / "shards"
    assert "left out 1 broken image" in succeed("data", "prepare", path, "--skip-broken", "--out", out).stderr
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["count"], meta["skipped"], meta["digest"]) == (299, 1, document["digest"])
    assert broken in said


def _break(path: Path) -> str:
    """Damage one image of a layout; returns how it is called."""
    if path.suffix == ".zip":
        content = bytearray(path.read_bytes())
        at = content.index(b"00001/img00000120.png")
        content[at + 60 : at + 80] = bytes(20)
        path.write_bytes(content)
        return f"{path}/00001/img00000120.png"
    if (path / "dataset.json").is_file():
        (path / "00001" / "img00000120.png").unlink()
        return f"{path / '00001' / 'img00000120.png'}"
    parquet = sorted(path.glob("*.parquet"))
    if parquet:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(parquet[1])
        images = table.column("img").to_pylist()
        images[5] = {"bytes": None, "path": None}
        table = table.set_column(table.schema.get_field_index("img"), "img", pa.array(images))
        pq.write_table(table, parquet[1])
        return f"{parquet[1]} row 5"
    if (path / "part-0.tar").is_file():
        content = bytearray((path / "part-0.tar").read_bytes())
        at = content.index(b"000007.png") + 512
        content[at : at + 40] = bytes(40)
        (path / "part-0.tar").write_bytes(content)
        return f"{path / 'part-0.tar'}/000007"
    file = sorted((path / "3").iterdir())[0]
    file.write_bytes(b"no image")
    return str(file)


def test_skipping_is_told_where_data_are_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [sorted((folder / name).iterdir())[0] for name in ("1", "6")]
    for file in names:
        file.write_bytes(b"")
    data = load_data(FolderConfig(path=str(folder), skip_broken=True))
    assert data.skipped == tuple(map(str, names))
    assert f"left out 2 broken images: {names[0]} and 1 more" in capsys.readouterr().err
    assert data.label is not None
    whole = load_data(FolderConfig(path=str(as_folder(folder.parent / "whole"))))
    assert whole.label is not None
    counts = whole.label.bincount() - data.label.bincount()
    assert counts.tolist() == [0, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    rows = torch.arange(len(data.x))
    assert all(bool((image == whole.x).flatten(1).all(1).any()) for image in data.x[rows])


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.mkdir()
    (path / "a.png").write_bytes(b"")
    refuse("data", "inspect", path, "--skip-broken", says=(str(path), "every one"))


def test_images_of_two_sizes(folder: Path) -> None:
    odd = folder / "5" / "00000.png"
    odd.write_bytes(png(np.zeros((1, 9, 12), np.uint8)))
    first = sorted((folder / "0").iterdir())[0]
    everywhere("folder", folder, (f"{odd} is 12x9 pixels", f"{first} is 8x8", "data.size=8"))
    found = json.loads(succeed("data", "inspect", folder, "--size", 8, "--json").stdout)
    assert (found["count"], found["shape"]) == (301, [1, 8, 8])


def test_grey_among_colours(folder: Path) -> None:
    odd = folder / "7" / "99999.png"
    odd.write_bytes(png(np.zeros((3, 8, 8), np.uint8)))
    everywhere("folder", folder, (f"{odd} is colour", "is grey", "data.channels=3"))
    assert json.loads(succeed("data", "inspect", folder, "--channels", 3, "--json").stdout)["shape"] == [3, 8, 8]


# Labels --------------------------------------------------------------------------------------------------------------


def test_an_image_without_a_class_among_others(folder: Path) -> None:
    file = folder / "loose.png"
    file.write_bytes(SQUARE)
    everywhere("folder", folder, (f"{file} has no label", "data.labels=false"))
    assert json.loads(succeed("data", "inspect", folder, "--no-labels", "--json").stdout)["num_classes"] == 0


def test_a_manifest_that_leaves_an_image_out(tmp_path: Path) -> None:
    path = as_edm_tree(tmp_path / "tree")
    document = json.loads((path / "dataset.json").read_text())
    del document["labels"][17]
    (path / "dataset.json").write_text(json.dumps(document))
    everywhere("folder", path, (f"{path}/00000/img00000017.png has no label",))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "damaged"),
        ("[1]", '"labels"'),
        ('{"classes": []}', '"labels"'),
        ('{"labels": [["00000/img00000000.png", 0.5]]}', "whole number"),
        ('{"labels": [["00000/img00000000.png", [0, 1]]]}', "whole number"),
        ('{"labels": 3}', "whole number"),
        ("\udcff", "damaged"),
    ],
)
def test_a_foreign_manifest(text: str, says: str, tmp_path: Path) -> None:
    path = as_edm_tree(tmp_path / "tree")
    (path / "dataset.json").write_bytes(text.encode(errors="surrogateescape"))
    everywhere("folder", path, (f"{path / 'dataset.json'}", says))


def test_a_manifest_without_labels_is_no_error(tmp_path: Path) -> None:
    path = as_edm_tree(tmp_path / "tree")
    for text in ('{"labels": null}', '{"labels": []}'):
        (path / "dataset.json").write_text(text)
        assert json.loads(succeed("data", "inspect", path, "--json").stdout)["num_classes"] == 0
    (path / "dataset.json").unlink()  # the folders of EDM are no classes
    assert json.loads(succeed("data", "inspect", path, "--json").stdout)["num_classes"] == 0


def relabel(path: Path, label: int) -> None:
    document = json.loads((path / "dataset.json").read_text())
    document["labels"][-1][1] = label
    (path / "dataset.json").write_text(json.dumps(document))


def test_numbers_that_are_no_classes(tmp_path: Path) -> None:
    path = as_edm_tree(tmp_path / "tree")
    for label in (11, 12):
        relabel(path, label)
        everywhere("folder", path, (str(path), f"labels up to {label}", "class 10"))
    relabel(path, -1)
    everywhere("folder", path, (f"{path}/00002/img00000299.png", "-1", "count from 0"))


def test_labels_that_were_insisted_on(tmp_path: Path) -> None:
    path = tmp_path / "flat"
    path.mkdir()
    (path / "a.png").write_bytes(SQUARE)
    file = tmp_path / "own.yaml"
    file.write_text(YAML.format(kind="folder", path=path))
    refuse("teach", file, "data.labels=true", says=(str(path), "no labels", "data.labels=true"))


# Places --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip", "parquet", "webdataset", "shards", "latents"])
def test_a_path_that_does_not_exist(kind: str, tmp_path: Path) -> None:
    (tmp_path / "digits.zip").write_bytes(b"")
    everywhere(kind, tmp_path / "digit.zip", (f"{tmp_path / 'digit.zip'}", "did you mean 'digits.zip'?"))
    file = tmp_path / "own.yaml"
    file.write_text(YAML.format(kind=kind, path=tmp_path / "other" / "place"))
    refuse("teach", file, says=(str(tmp_path / "other" / "place"), "known: digits.zip"))


def test_a_variable_that_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_NOWHERE", raising=False)
    for text in ("$FEWSTEP_NOWHERE/x", "${FEWSTEP_NOWHERE}/x"):
        file = tmp_path / "own.yaml"
        file.write_text(YAML.format(kind="folder", path=text))
        refuse("teach", file, "--out", tmp_path / "run", says=("FEWSTEP_NOWHERE is not set", text))
        refuse("data", "inspect", text, says=("FEWSTEP_NOWHERE is not set",))


def test_a_variable_that_is_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config keeps the variable: the same file serves on another machine."""
    monkeypatch.setenv("FEWSTEP_SOMEWHERE", str(folder.parent))
    for text in ("$FEWSTEP_SOMEWHERE/digits", "${FEWSTEP_SOMEWHERE}/digits"):
        assert load_data(FolderConfig(path=text)).name == "digits"
        assert json.loads(succeed("data", "inspect", text, "--json").stdout)["count"] == 300


def test_folders_without_images(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.mkdir()
    everywhere("folder", path, (str(path), "no images"))
    (path / "readme.txt").write_text("x")
    (path / ".hidden.png").write_bytes(SQUARE)
    everywhere("folder", path, (str(path), "no images"))
    for kind, word in (("parquet", "no parquet files"), ("webdataset", "no tar archives"), ("latents", "no latents")):
        everywhere(kind, path, (str(path), word))
    refuse("data", "inspect", path, says=(str(path), "no data of a known kind"))


def test_an_empty_class_folder(folder: Path) -> None:
    (folder / "35").mkdir()
    everywhere("folder", folder, (str(folder / "35"), "no images"))


def test_a_folder_for_a_file_and_the_reverse(folder: Path, tmp_path: Path) -> None:
    archive = as_zip(tmp_path / "digits")
    everywhere("folder", archive, (str(archive), "data.kind=zip"))
    everywhere("zip", folder, (str(folder), "data.kind=folder"))


# Archives ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_a_zip_archive_cut_short(keep: int, tmp_path: Path) -> None:
    path = as_zip(tmp_path / "digits")
    path.write_bytes(path.read_bytes()[:keep])
    everywhere("zip", path, (str(path), "no zip archive, or not all of one"))


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_a_parquet_file_cut_short(keep: int, tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "digits")
    file = path / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    everywhere("parquet", path, (str(file), "no parquet file, or damaged"))


@pytest.mark.parametrize(("part", "keep"), [(0, 100), (0, 20_000), (1, 0), (1, 10), (1, 5000)])
def test_a_tar_archive_cut_short(part: int, keep: int, tmp_path: Path) -> None:
    path = as_tar(tmp_path / "digits")
    file = sorted(path.iterdir())[part]
    file.write_bytes(file.read_bytes()[:keep])
    everywhere("webdataset", path, (str(file), "no tar archive, or not all of one"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("000300.cls", b"seven", "'seven', which is no whole number"),
        ("000300.json", b"{", "damaged"),
        ("000300.json", b'{"label": "7"}', "no label"),
        ("000300.txt", b"a seven", "no label"),
    ],
)
def test_labels_of_a_tar_archive(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = as_tar(tmp_path / "digits")
    with tarfile.open(path / "part-2.tar", "w") as archive:
        add(archive, "000300.png", SQUARE)
        add(archive, name, content)
    everywhere("webdataset", path, (f"{path / 'part-2.tar'}/000300", says))


def test_captions_are_no_labels(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "captioned.tar", "w") as archive:
        for key, text in (("a", "a dog"), ("b", "two cats")):
            add(archive, f"{key}.png", SQUARE)
            add(archive, f"{key}.txt", text.encode())
    found = json.loads(succeed("data", "inspect", tmp_path / "captioned.tar", "--json").stdout)
    assert (found["count"], found["num_classes"]) == (2, 0)


def test_a_sample_without_an_image(tmp_path: Path) -> None:
    path = as_tar(tmp_path / "digits")
    with tarfile.open(path / "part-2.tar", "w") as archive:
        add(archive, "x/000300.cls", b"7")
    everywhere("webdataset", path, (f"{path / 'part-2.tar'}/x/000300", "has no image"))


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "columns.parquet"
    pq.write_table(pa.table({"picture": [{"bytes": SQUARE}] * 2, "kind": ["b", "a"]}), path)
    everywhere("parquet", path, (str(path), "no column image or img", "data.image_column", "picture, kind"))
    file = tmp_path / "own.yaml"
    refuse("teach", file, "data.image_column=pictur", says=(str(path), "did you mean 'picture'?"))
    refuse("teach", file, "data.image_column=picture", "data.labels=true", says=(str(path), "data.label_column"))
    refuse("data", "inspect", file, says=("no column image",))
    text = YAML.format(kind=f"parquet, image_column: picture, label_column: kind, name: {tmp_path.name}", path=path)
    file.write_text(text)
    found = json.loads(succeed("data", "inspect", file, "--json").stdout)
    assert (found["class_names"], found["class_counts"], found["name"]) == (["a", "b"], [1, 1], tmp_path.name)


def test_labels_of_a_parquet_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "labels.parquet"
    for labels, says in (([0, None, 1], "row 1 has no label"), ([0.5, 1.0, 2.0], "row 0: column label holds '0.5'")):
        pq.write_table(pa.table({"image": [SQUARE] * 3, "label": labels}), path)
        everywhere("parquet", path, (str(path), says))


def test_several_sets_in_one_folder(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "digits")
    shutil.copy(path / "train-00000-of-00002.parquet", path / "test-00000-of-00001.parquet")
    everywhere("parquet", path, (str(path), "test, train", f"{path}/train*"))
    found = succeed("data", "inspect", f"{path}/train*.parquet", "--json")
    assert json.loads(found.stdout)["count"] == 300
    refuse("data", "inspect", f"{path}/valid*.parquet", says=("no parquet files matches", "valid*"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_parquet(tmp_path / "digits")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    everywhere("parquet", path, ("pyarrow", "pip install 'fewstep[data]'"), code=3)


# Shards --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    succeed("data", "prepare", folder, "--out", tmp_path / "prepared", "--shard-size", 128)
    return tmp_path / "prepared"


def test_a_flipped_bit_is_found_by_its_digest(shards: Path) -> None:
    file = shards / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refuse("data", "inspect", shards, says=(str(file), "digest"))


def test_shards_that_are_cut_short_or_gone(shards: Path) -> None:
    file = shards / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    file_says = (str(file), "damaged")
    refuse("data", "inspect", shards, says=file_says)
    yaml = shards.parent / "own.yaml"
    yaml.write_text(YAML.format(kind="shards", path=shards))
    refuse("teach", yaml, "--out", shards.parent / "run", says=file_says)
    file.unlink()
    refuse("teach", yaml, "--out", shards.parent / "run", says=(str(file), "missing"))


META: dict[str, Callable[[dict], object]] = {
    "another format": lambda meta: meta.update(format="zarr"),
    "a later schema": lambda meta: meta.update(schema=2),
    "no shape": lambda meta: meta.pop("shape"),
    "another shape": lambda meta: meta.update(shape=[1, 8, 9]),
    "an unknown kind": lambda meta: meta.update(kind="video"),
    "another count": lambda meta: meta["shards"][0].update(count=100),
    "too few classes": lambda meta: meta.update(num_classes=9),
    "no list of shards": lambda meta: meta.update(shards=3),
    "latents without a scale": lambda meta: meta.update(kind="latents"),
}


@pytest.mark.parametrize("case", META)
def test_a_meta_json_that_does_not_fit(case: str, shards: Path) -> None:
    document = json.loads((shards / "meta.json").read_text())
    META[case](document)
    (shards / "meta.json").write_text(json.dumps(document))
    yaml = shards.parent / "own.yaml"
    yaml.write_text(YAML.format(kind="shards", path=shards))
    refuse("teach", yaml, "--out", shards.parent / "run", says=(str(shards),))


def test_where_shards_may_go(folder: Path, shards: Path) -> None:
    before = contents(folder.parent)
    refuse("data", "prepare", folder, "--out", shards, says=(str(shards), "--overwrite"))
    refuse("data", "prepare", folder, "--out", folder / "4", "--overwrite", says=(str(folder / "4"), "not overwriting"))
    refuse("data", "prepare", shards, "--out", shards, "--overwrite", says=(str(shards), "another --out"))
    refuse("data", "prepare", folder / "4", "--out", folder, "--overwrite", says=("another --out",))
    refuse("data", "prepare", "digits-teacher", "--out", folder.parent / "d", says=("digits", "no shards"))
    assert contents(folder.parent) == before


def test_a_fault_in_the_middle_leaves_the_earlier_shards(folder: Path, shards: Path) -> None:
    before = contents(shards)
    sorted((folder / "9").iterdir())[-1].write_bytes(b"")
    refuse("data", "prepare", folder, "--out", shards, "--overwrite", "--shard-size", 50, says=("does not decode",))
    assert contents(shards) == before
    assert [file.name for file in shards.parent.iterdir() if file.name.startswith(".")] == []


# Options -------------------------------------------------------------------------------------------------------------


def test_options_that_data_do_not_have(shards: Path, tmp_path: Path) -> None:
    refuse("data", "inspect", shards, "--size", 4, says=("kind shards", "no size"))
    refuse("data", "inspect", "digits-teacher", "--skip-broken", says=("digits", "no skip_broken"))
    refuse("data", "inspect", "digits-teache", says=("digits-teache",))
    refuse("data", "stats", shards, "--features", "pixels", says=("--out",))
    refuse("data", "stats", shards, "--out", tmp_path / "x.npz", says=("--features",))
    refuse("data", "stats", shards, "--features", "pixel", "--out", tmp_path / "x.npz", says=("'pixels'",))
    refuse("teach", "digits-teacher", "data={kind: foldr, path: x}", says=("data.kind", "did you mean 'folder'?"))
    refuse("teach", "digits-teacher", "data={kind: folder, path: x, sise: 3}", says=("data.sise", "'size'"))
    refuse("teach", "digits-teacher", "data={kind: folder, path: x, channels: 2}", says=("data.channels",))
    assert not (tmp_path / "x.npz").exists()


def test_an_unknown_file(tmp_path: Path) -> None:
    file = tmp_path / "data.bin"
    file.write_bytes(b"x")
    refuse("data", "inspect", file, says=(str(file), ".parquet"))
    save_file({"weights": torch.zeros(3)}, tmp_path / "model.safetensors")
    refuse("data", "inspect", tmp_path, says=("model.safetensors", "no latents"))


def test_an_image_that_would_fill_the_memory(tmp_path: Path) -> None:
    """An image that would need gigabytes is broken, and is not decoded."""
    (tmp_path / "data").mkdir()
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + SQUARE[24:29]
    content = SQUARE[:12] + header + struct.pack(">I", zlib.crc32(header)) + SQUARE[33:]
    (tmp_path / "data" / "bomb.png").write_bytes(content)
    refuse("data", "inspect", tmp_path / "data", says=("bomb.png", "does not decode", "exceeds limit"))
