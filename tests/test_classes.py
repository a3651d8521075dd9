"""Classes carried, exported and imported, on real checkpoints of small runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_dml import class_carry, class_export, class_import
from dist_dml.checkpoint_manifest import newest_checkpoint, verify_checkpoint
from dist_dml.class_store import StoredClasses
from dist_dml.config_loading import resolve
from dist_dml.data.index_command import build_index
from dist_dml.data.shards import write_shard
from dist_dml.errors import UsageError
from dist_dml.train import main as train

pytestmark = pytest.mark.slow

OLD = ("ant", "bee", "cat", "dog", "eel")
NEW = ("ape", "bee", "cat", "eel", "fly", "fox")


def pack(folder: Path, names: tuple[str, ...], images: int = 6) -> Path:
    """Noisy patterns, the same for the same name."""
    rows = []
    for name in names:
        draw = np.random.default_rng(sum(name.encode()))
        pattern = cv2.resize(draw.integers(0, 256, (4, 4), dtype=np.uint8), (12, 12))
        for number in range(images):
            noisy = np.clip(pattern + draw.normal(0, 30, (12, 12)), 0, 255).astype(np.uint8)
            png = cv2.imencode(".png", noisy)[1].tobytes()
            rows.append({"__key__": f"{name}{number}", "png": png, "cls": name.encode()})
    folder.mkdir()
    write_shard(folder / "train-000000.tar", rows)
    build_index(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    pack(folder / "old", OLD)
    pack(folder / "new", NEW)
    return folder


def settings(place: Path, *words: str) -> list[str]:
    return [
        f"data.path={place / 'old'}",
        f"run.root={place / 'runs'}",
        "data.batch_size=10",
        "data.loader_processes=0",
        "data.image={size: 12, channels: 1, resize: 0, mean: [0.5], std: [0.25]}",
        "model={embedding_dim: 8, norm: batch}",
        "training.epochs=2",
        "checkpoint.best_metric=",
        "tracking={every_steps: 1, mlflow: false}",
        "evaluation={every_epochs: 0, nmi: false, protocols: [{name: known, query: train}]}",
        *words,
    ]


def trained(place: Path, name: str, *words: str) -> Path:
    """A run of two epochs, trained once."""
    folder = place / "runs" / name
    if not folder.exists():
        assert train(settings(place, f"run.name={name}", *words)) == 0
    return folder


def command(module: ModuleType, *words: str) -> Path:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments = parser.parse_intermixed_args(words)
    action: Any = {
        class_carry: class_carry.carry,
        class_export: class_export.export,
        class_import: class_import.import_classes,
    }[module]
    return action(arguments)


def rows_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every class's rows, joined over the files."""
    manifest = verify_checkpoint(checkpoint)
    stored = StoredClasses.open(checkpoint, manifest)
    return {key: stored.take(key, np.arange(manifest.num_classes)) for key in stored.layout}


def newest(folder: Path) -> Path:
    found = newest_checkpoint(folder / "checkpoints")
    assert found is not None
    return found[0]


LOSSES = {
    "plain": ("loss.similarity=linear",),
    "cosine": ("loss.similarity=cosine", "optimizer.name=sgd"),
    "centres": ("loss.name=sub_centre_arcface", "loss.centres=2"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_carried_classes_keep_everything_to_the_bit_and_training_goes_on(
    place: Path, name: str
) -> None:
    run = trained(place, name, *LOSSES[name])
    before = rows_of(newest(run))
    carried = command(class_carry, str(run), f"run.name={name}_new", f"data.path={place / 'new'}")
    after = rows_of(carried)
    assert after.keys() == before.keys()
    for key, rows in after.items():
        assert len(rows) == len(NEW)
        for class_id, text in enumerate(NEW):
            if text in OLD:
                assert torch.equal(rows[class_id], before[key][OLD.index(text)]), key
            elif "|" in key:
                assert rows[class_id].count_nonzero() == 0
    # New weights point to their images: nearer to their own class's embeddings than to others'.
    weight = after["weight"].flatten(0, -2) if name != "centres" else after["weight"][:, 0]
    norms = before["weight"].norm(dim=-1)
    fresh = [class_id for class_id, text in enumerate(NEW) if text not in OLD]
    torch.testing.assert_close(
        weight[fresh].norm(dim=-1), norms.mean().expand(len(fresh)), rtol=1e-4, atol=1e-6
    )
    if name == "centres":
        assert not torch.equal(after["weight"][fresh[0], 0], after["weight"][fresh[0], 1])
    # The embedder and its optimizer are copied; training resumes without being asked anything.
    for part in ("embedder.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(carried / part), load_file(newest(run) / part)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    config = str(carried.parents[1] / "config.yaml")
    assert resolve(config, []).config.data.path == str(place / "new")
    assert train(["--config", config, "--resume", "auto", "training.epochs=4"]) == 0
    assert verify_checkpoint(newest(carried.parents[1])).num_classes == len(NEW)


def test_growing_by_a_tenth_leaves_the_logits_of_old_classes_alone(place: Path) -> None:
    twenty = tuple(f"c{number:02d}" for number in range(20))
    many = pack(place / "twenty", twenty)
    more = pack(place / "twenty-two", (*twenty, "c20", "c21"))
    run = trained(place, "grow", f"data.path={many}")
    carried = command(class_carry, str(run), "run.name=grown", f"data.path={more}")
    before, after = rows_of(newest(run)), rows_of(carried)
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))

    def logits(found: dict[str, Tensor]) -> Tensor:
        return rows @ found["weight"][:20].T + found["bias"][:20]

    assert torch.equal(logits(after), logits(before))
    assert len(after["weight"]) == 22


def test_new_rows_are_drawn_where_no_images_are_wanted(place: Path) -> None:
    run = trained(place, "plain", *LOSSES["plain"])
    words = [str(run), f"data.path={place / 'new'}", "--images", "0"]
    first = rows_of(command(class_carry, *words, "run.name=drawn"))
    again = rows_of(command(class_carry, *words, "run.name=drawn_again"))
    other = rows_of(command(class_carry, *words, "run.name=drawn_other", "run.seed=9"))
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["weight"][0], other["weight"][0])
    assert torch.equal(first["weight"][1], other["weight"][1])


def test_merged_classes_are_the_mean_and_split_ones_begin_alike(
    place: Path, tmp_path: Path
) -> None:
    run = trained(place, "plain", *LOSSES["plain"])
    before = rows_of(newest(run))
    (tmp_path / "m.csv").write_text("old,new\nant,bee\nbee,bee\ndog,fox\ndog,fly\n")
    words = [f"data.path={place / 'new'}", "--mapping", str(tmp_path / "m.csv")]
    after = rows_of(command(class_carry, str(run), *words, "run.name=merged"))
    for key, rows in before.items():
        mean = (rows[0].double() + rows[1].double()) / 2
        torch.testing.assert_close(after[key][1], mean.to(rows.dtype))
        assert torch.equal(after[key][4], rows[3])
        assert torch.equal(after[key][5], rows[3])


def test_a_memory_forgets_dropped_classes_and_follows_the_others(place: Path) -> None:
    pairs = ("loss.name=c2", "loss.memory_size=20", "data.order=balanced")
    run = trained(place, "pairs", *pairs, "data.samples_per_class=2")
    before = load_file(newest(run) / "shared.safetensors")
    carried = command(class_carry, str(run), "run.name=pairs_new", f"data.path={place / 'new'}")
    after = load_file(carried / "shared.safetensors")
    assert torch.equal(after["rows"], before["rows"])
    names = [NEW.index(OLD[old]) if OLD[old] in NEW else -100 for old in before["labels"].tolist()]
    assert after["labels"].tolist() == names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run.name=plain"], "is not empty"),
        (["run.name=x", "model.embedding_dim=9"], "model.embedding_dim 8 -> 9"),
        (["run.name=x", "--catalogue", "NEW"], "was trained on"),
        (["run.name=x", "data.path=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_carried_is_refused_and_nothing_is_left(
    place: Path, words: list[str], said: str
) -> None:
    run = trained(place, "plain", *LOSSES["plain"])
    words = [word.replace("NEW", str(place / "new")) for word in words]
    with pytest.raises(UsageError, match=said):
        command(class_carry, str(run), *words)
    assert not (place / "runs" / "x").exists()


def test_exported_weights_come_back_by_name_and_by_number(place: Path, tmp_path: Path) -> None:
    run = trained(place, "plain", *LOSSES["plain"])
    before = rows_of(newest(run))
    table_path = command(class_export, str(run), str(tmp_path / "w.parquet"))
    table = pyarrow.parquet.read_table(table_path)
    assert table["name"].to_pylist() == list(OLD)
    assert np.array_equal(np.stack(table["weight"].to_numpy()), before["weight"].numpy())
    assert np.array_equal(table["bias"].to_numpy(), before["bias"].numpy())
    plain = load_file(command(class_export, str(run), str(tmp_path / "w.safetensors")))
    assert torch.equal(plain["weight"], before["weight"])

    # Into a run on another catalogue: by name. Numbered files must have as many classes.
    other = trained(place, "other", f"data.path={place / 'new'}", "loss.similarity=linear")
    own = rows_of(newest(other))
    found = rows_of(command(class_import, str(other), str(table_path), "run.name=by_name"))
    for class_id, text in enumerate(NEW):
        source, at = (before, OLD.index(text)) if text in OLD else (own, class_id)
        for key in ("weight", "bias"):
            assert torch.equal(found[key][class_id], source[key][at])
        assert (found["weight|exp_avg"][class_id].count_nonzero() == 0) == (text in OLD)
    with pytest.raises(UsageError, match="5 classes without names, and the run has 6"):
        command(class_import, str(other), str(tmp_path / "w.safetensors"), "run.name=no")
    back = command(class_import, str(run), str(tmp_path / "w.safetensors"), "run.name=back")
    assert torch.equal(rows_of(back)["weight"], before["weight"])
    config = str(back.parents[1] / "config.yaml")
    assert train(["--config", config, "--resume", "auto", "training.epochs=3"]) == 0


@pytest.mark.parametrize("kind", ["checkpoint", "module", "tensor"])
def test_partial_fcs_files_are_read_as_their_versions_write_them(
    place: Path, tmp_path: Path, kind: str
) -> None:
    run = trained(place, "plain", *LOSSES["plain"])
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    files = []
    for rank, part in enumerate(weight.split([2, 2, 1])):
        content, name = {
            "checkpoint": (
                {"epoch": 3, "state_dict_backbone": {}, "state_dict_softmax_fc": {"weight": part}},
                f"checkpoint_gpu_{rank}.pt",
            ),
            "module": ({"weight": part, "weight_mom": part}, f"softmax_fc_gpu_{rank}.pt"),
            "tensor": (part, f"rank_{rank}_softmax_weight.pt"),
        }[kind]
        torch.save(content, tmp_path / name)
        files.append(str(tmp_path / name))
    found = command(class_import, str(run), *reversed(files), f"run.name=pfc_{kind}")
    assert torch.equal(rows_of(found)["weight"], weight)
    with pytest.raises(UsageError, match=r"numbered 0, 2; give each of 0 to 2"):
        command(class_import, str(run), files[0], files[2], "run.name=no")


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return print, ("unpickled",)


def test_a_pickle_with_more_than_tensors_is_never_opened(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(place, "plain", *LOSSES["plain"])
    torch.save({"weight": torch.zeros(5, 8), "more": Bomb()}, tmp_path / "softmax_fc_gpu_0.pt")
    capsys.readouterr()
    with pytest.raises(UsageError, match="cannot be read as plain tensors"):
        command(class_import, str(run), str(tmp_path / "softmax_fc_gpu_0.pt"), "run.name=no")
    assert "unpickled" not in capsys.readouterr().out
    assert not (place / "runs" / "no").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("weights.bin", b"", "none of .parquet"),
        ("w.safetensors", b"nothing", "cannot be read"),
        ("w.parquet", b"nothing", "no file of `dist-dml classes export`"),
        ("other.pt", b"", "is not named as Partial FC's"),
        ("softmax_fc_gpu_0.pt", b"nothing", "cannot be read as plain tensors"),
    ],
)
def test_files_of_another_kind_are_refused(
    place: Path, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    run = trained(place, "plain", *LOSSES["plain"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        command(class_import, str(run), str(tmp_path / name), "run.name=no")
