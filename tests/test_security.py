"""Nothing from outside is executed, nothing is written under a name that leads out."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from dist_dml import plain_yaml
from dist_dml.class_import import read_foreign
from dist_dml.cli import main
from dist_dml.config_loading import resolve
from dist_dml.data.dali_export import export_dali
from dist_dml.data.index import load_index
from dist_dml.data.index_command import ScanOptions, build_index
from dist_dml.data.pack.cifar_archive import read_archive
from dist_dml.data.pack.cub import pack_cub
from dist_dml.data.pack.hub import pack_hub
from dist_dml.data.pack.manifest import pack_manifest
from dist_dml.data.shards import write_shard
from dist_dml.errors import RunError, UsageError
from dist_dml.models.weights import load_weights
from dist_dml.protocol_measure import read_embeddings
from dist_dml.tracking import run_files
from dist_dml.tracking.destination import stored_config
from dist_dml.tracking.recorder import Recorder

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "dist_dml").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]

# Calls that run what they are given, by the last parts of their names.
EXECUTES = (
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "dill.load"),
    *("cPickle.load", "joblib.load", "marshal.load", "marshal.loads", "shelve.open"),
    *("pandas.read_pickle", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load"),
    *("yaml.load_all", "os.system", "os.popen", "subprocess.getoutput", "torch.hub.load"),
    *("torch.jit.load", "torch.package.PackageImporter", "tempfile.mktemp"),
)
UNSAFE_LOADERS = ("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader")
BUILTINS = ("eval", "exec", "compile", "__import__")


def problems_of(source: str) -> list[str]:
    """Calls by which outside data could be executed, or written anywhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            found += [f"{node.lineno}: imports {name}" for name in names if _is(name, EXECUTES)]
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_LOADERS:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        wrong = _is(name, EXECUTES) or name in BUILTINS or given.get("shell", "False") != "False"
        if _is(name, ("torch.load",)):
            wrong = given.get("weights_only") != "True"
        elif _is(name, ("np.load", "numpy.load")):
            wrong = given.get("allow_pickle", "False") != "False"
        elif _is(name, ("yaml.load",)):
            wrong = given.get("Loader") not in ("_Loader", "yaml.SafeLoader", *UNSAFE_LOADERS)
        elif name.endswith(".extractall"):
            wrong = given.get("filter") != "'data'"
        elif name.endswith(".extract"):
            wrong = True
        elif name.endswith("import_module"):
            # Names of modules come from tables of the program, never from a configuration.
            known = isinstance(node.args[0], ast.Constant)
            wrong = not known and ast.unparse(node.args[0]) != "COMMANDS[name][0]"
        if wrong:
            found.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    return found


def _is(name: str, wanted: tuple[str, ...]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in wanted)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_executes_what_it_reads(path: Path) -> None:
    assert problems_of(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(stream)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=chosen)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "yaml.unsafe_load(text)",
        "class Mine(yaml.Loader): pass",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "tar.extractall(folder)",
        "tar.extractall(folder, filter='tar')",
        "zip.extract(name)",
        "importlib.import_module(config.model.backbone)",
    ],
)
def test_a_line_that_would_is_found(line: str) -> None:
    assert len(problems_of(line)) == 1


def test_what_is_safe_is_not_reported() -> None:
    lines = "model.eval()", "re.compile(text)", "np.load(path)", "torch.load(p, weights_only=True)"
    assert [problems_of(line) for line in lines] == [[]] * 4
    assert issubclass(plain_yaml._Loader, yaml.SafeLoader)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.mark),)


def planted(folder: Path, kind: str, mark: Path) -> Path:
    """A file of some kind with the payload in it."""
    path = folder / kind
    payload = Payload(mark)
    if kind.startswith("torch"):
        torch.save({"weight": torch.zeros(2, 2), "x": payload}, path)
    elif kind.startswith("npz"):
        np.savez(path.with_suffix(".npz"), vectors=np.array([payload], object))
        path.with_suffix(".npz").rename(path)
    elif kind.startswith("npy"):
        with path.open("wb") as stream:
            np.save(stream, np.array([payload], object))
    else:
        path.write_bytes(pickle.dumps(payload, protocol=2))
    return path


def as_weights(path: Path, suffix: str) -> None:
    target = path.with_suffix(suffix)
    path.rename(target)
    load_weights(torch.nn.Linear(2, 2), str(target))


def as_partial_fc(path: Path) -> None:
    target = path.with_name("softmax_fc_gpu_0.pt")
    path.rename(target)
    read_foreign([str(target)])


def as_exported(path: Path, suffix: str) -> None:
    target = path.with_suffix(suffix)
    path.rename(target)
    read_foreign([str(target)])


READERS: dict[str, Callable[[Path], object]] = {
    "model.weights .pth": lambda path: as_weights(path, ".pth"),
    "model.weights .safetensors": lambda path: as_weights(path, ".safetensors"),
    "Partial FC": as_partial_fc,
    "classes import .safetensors": lambda path: as_exported(path, ".safetensors"),
    "classes import .parquet": lambda path: as_exported(path, ".parquet"),
    "embeddings of a test": read_embeddings,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pickle", "torch", "npz", "npy"])
def test_a_planted_pickle_is_refused_and_never_runs(tmp_path, reader, kind) -> None:
    mark = tmp_path / "it ran"
    path = planted(tmp_path, kind, mark)
    with pytest.raises(UsageError):
        READERS[reader](path)
    assert not mark.exists()


def test_the_planted_pickle_would_run(tmp_path) -> None:
    for kind in ("torch", "npy", "pickle"):
        mark = tmp_path / f"{kind} ran"
        path = planted(tmp_path, kind, mark)
        if kind == "torch":
            torch.load(path, weights_only=False)
        else:
            np.load(path, allow_pickle=True)
        assert mark.exists()


YAML_TAGS = (
    "!!python/object/apply:os.mkdir ['{mark}']",
    "!!python/object/new:os.mkdir ['{mark}']",
    "!!python/name:os.mkdir ''",
    "!!python/module:os ''",
)


@pytest.mark.parametrize("tag", YAML_TAGS)
def test_a_yaml_tag_is_refused_and_never_runs(tmp_path, tag) -> None:
    mark = tmp_path / "it ran"
    text = tag.format(mark=mark)
    file = tmp_path / "config.yaml"
    file.write_text(f"run:\n  name: {text}\n")
    with pytest.raises(UsageError, match="is not valid YAML"):
        resolve(str(file), [])
    with pytest.raises(UsageError, match="is not valid YAML"):
        resolve(None, [f"run.name={text}"])
    with pytest.raises(UsageError, match="cannot be read as a config"):
        stored_config(tmp_path)
    assert not mark.exists()


# Names that would lead out of a folder, for readers that took them as paths.
LEADS_OUT = ("../../evil.png", "/{root}/evil.png", "a/../../../evil.png", "nul\0byte.png")
PNG = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()


def everything_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def crafted_tar(path: Path, root: Path) -> None:
    """Members whose names lead out, links to files outside, and one sound sample."""

    def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, to: str = "") -> None:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = len(content), kind, to
        tar.addfile(info, io.BytesIO(content))

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add("good.png", PNG)
        add("good.cls", b"a")
        for text in LEADS_OUT:
            name = text.format(root=str(root).lstrip("/"))
            add(name, PNG)
            add(name.replace(".png", ".cls"), b"a")
        add("link.png", kind=tarfile.SYMTYPE, to=str(root / "outside.txt"))
        add("link.cls", b"a")
        add("hard.png", kind=tarfile.LNKTYPE, to="../../outside.txt")
        add("hard.cls", b"a")
        add("device.png", kind=tarfile.CHRTYPE)


def test_a_crafted_shard_writes_nothing_outside_its_index(tmp_path) -> None:
    (tmp_path / "outside.txt").write_text("untouched")
    shards = tmp_path / "deep" / "shards"
    shards.mkdir(parents=True)
    crafted_tar(shards / "train-000000.tar", tmp_path)
    before = everything_below(tmp_path)
    build_index(shards, options=ScanOptions(damaged="skip"))
    index = load_index(shards)
    assert main(["verify", str(shards), "--fix"]) == 0
    export_dali(load_index(shards))
    written = everything_below(tmp_path) - before
    assert written
    assert all(name.startswith("deep/shards/") for name in written), written
    assert (tmp_path / "outside.txt").read_text() == "untouched"
    keys = [index.key(number) for number in range(len(index))]
    assert "good" in keys
    assert not {"link", "hard", "device"} & set(keys), "links and devices hold no image"


@pytest.mark.parametrize("key", ["../evil", "a/../../evil", "/evil", "nul\0byte", ".."])
def test_no_tar_of_ours_has_a_name_that_leads_out(tmp_path, key) -> None:
    with pytest.raises(UsageError, match="would lead out of the folder"):
        write_shard(tmp_path / "a.tar", [{"__key__": key, "png": PNG, "cls": b"a"}])
    assert everything_below(tmp_path) == set()


@pytest.mark.parametrize("key", ["a..b", "..a/b", "a/b..", "...", "a/./b"])
def test_dots_that_lead_nowhere_are_fine(tmp_path, key) -> None:
    assert write_shard(tmp_path / "a.tar", [{"__key__": key, "png": PNG, "cls": b"a"}]) == 1


def cub_lists(path: str) -> dict[str, str]:
    return {
        "images.txt": f"1 {path}\n2 101.B/b.jpg\n",
        "image_class_labels.txt": "1 1\n2 101\n",
        "classes.txt": f"1 {path.split('/')[0]}\n101 101.B\n",
    }


@pytest.mark.parametrize("path", ["../evil.jpg", "a/../../evil.jpg", "a\\..\\evil.jpg"])
@pytest.mark.parametrize("zipped", [False, True])
def test_an_official_list_cannot_name_files_outside(tmp_path, path, zipped) -> None:
    (tmp_path / "evil.jpg").write_bytes(PNG)
    src = tmp_path / "CUB_200_2011"
    (src / "images" / "101.B").mkdir(parents=True)
    (src / "images" / "101.B" / "b.jpg").write_bytes(PNG)
    for name, text in cub_lists(path).items():
        (src / name).write_text(text)
    if zipped:
        with zipfile.ZipFile(tmp_path / "cub.zip", "w") as archive:
            for file in filter(Path.is_file, src.rglob("*")):
                archive.write(file, file.relative_to(tmp_path))
            archive.writestr(f"CUB_200_2011/images/{path}", PNG)
        src = tmp_path / "cub.zip"
    before = everything_below(tmp_path)
    with pytest.raises(UsageError, match="leads out of the data set"):
        pack_cub(src, tmp_path / "out", processes=1)
    assert {name for name in everything_below(tmp_path) - before if name != "out"} == set()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "..", "nul\0byte", "a\\b", ""])
@pytest.mark.parametrize("place", ["split", "file"])
def test_a_hub_data_set_cannot_name_files_outside(tmp_path, name, place) -> None:
    src = tmp_path / "set"
    (src / "train").mkdir(parents=True)
    splits = [name] if place == "split" else ["train"]
    (src / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    state = {"_data_files": [{"filename": name}]}
    (src / "train" / "state.json").write_text(json.dumps(state))
    before = everything_below(tmp_path)
    with pytest.raises(UsageError):
        pack_hub(src, tmp_path / "out")
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("path", ["../evil.png", "/etc/hostname", "nul\0byte.png"])
def test_a_manifest_cannot_name_files_outside_unless_told(tmp_path, path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "evil.png").write_bytes(PNG)
    (folder / "list.csv").write_text(f"path,label,split\n{path},a,train\n")
    with pytest.raises(UsageError):
        pack_manifest(folder / "list.csv", tmp_path / "out", processes=1)
    assert not (tmp_path / "out").exists() or everything_below(tmp_path / "out") == set()


@pytest.mark.parametrize("split", ["../evil", "/evil", "nul\0byte", ""])
def test_a_manifest_cannot_name_shards_outside(tmp_path, split) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "list.csv").write_text(f"path,label,split\na.png,a,{split}\n")
    with pytest.raises(UsageError):
        pack_manifest(tmp_path / "list.csv", tmp_path / "out", processes=1)
    assert everything_below(tmp_path) == {"a.png", "list.csv"}


def test_members_of_a_cifar_archive_are_never_written(tmp_path) -> None:
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as tar:
        for name in ("../../../data_batch_1.bin", str(tmp_path / "evil.bin")):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(UsageError):
        read_archive(tmp_path / "cifar.tar.gz")
    assert everything_below(tmp_path) == {"cifar.tar.gz"}


def test_a_member_that_states_a_huge_size_is_not_read(tmp_path) -> None:
    info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    info.size = 2**40
    (tmp_path / "cifar.tar").write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(UsageError, match=r"data_batch_1\.bin has 1,099,511,627,776 bytes"):
        read_archive(tmp_path / "cifar.tar")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "nul\0byte"])
def test_a_configuration_cannot_put_a_run_outside_its_root(tmp_path, name) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({"run": {"name": name}}))
    with pytest.raises(UsageError, match=r"leads out of run\.root|zero byte"):
        resolve(str(file), [])


@pytest.fixture
def received_run(tmp_path: Path) -> Iterator[Path]:
    """A run folder from elsewhere whose events name this machine's files."""
    (tmp_path / "private.txt").write_text("private")
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {name: a}\n")
    (folder / "figure.txt").write_text("a figure")
    (folder / "link.txt").symlink_to(tmp_path / "private.txt")
    recorder = Recorder(folder)
    recorder.note_artifact(folder / "figure.txt")
    for path in ("../../private.txt", str(tmp_path / "private.txt"), "link.txt"):
        run_files.append_event(folder, {"path": path, "folder": ""})
    recorder.note_end("FINISHED")
    recorder.close()
    return folder


# SQLAlchemy calls some of what MLflow uses deprecated; connections close with the garbage.
@pytest.mark.filterwarnings("ignore")
def test_a_run_from_elsewhere_sends_no_file_of_this_machine_to_mlflow(received_run) -> None:
    from dist_dml.config import TrackingConfig
    from dist_dml.tracking.destination import ARTIFACTS, destination_of
    from dist_dml.tracking.mlflow_mirror import mirror_once

    root = received_run.parent
    mirror_once(received_run, destination_of(TrackingConfig(), root, "a"))
    sent = {path.name for path in (root / ARTIFACTS).rglob("*") if path.is_file()}
    assert sent == {"config.yaml", "figure.txt"}
    log = (received_run / run_files.MIRROR_LOG).read_text()
    assert log.count("lies outside the run folder; not uploaded") == 3


def test_a_zip_that_claims_a_huge_member_is_not_unpacked(tmp_path, monkeypatch) -> None:
    from dist_dml.data.pack import image_files

    monkeypatch.setattr(image_files, "_MAX_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.txt", bytes(10**7))
    tree = image_files.open_tree(tmp_path / "a.zip", "a zip")
    with pytest.raises(RunError, match="expected at most"):
        tree.read("bomb.txt")
