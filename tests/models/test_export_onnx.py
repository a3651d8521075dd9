"""`torch.export` and ONNX files, read back by what their users read them with."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_files import IMAGE, picture, trained, written

from dist_dml.config import ModelConfig
from dist_dml.data.augment import evaluation_view
from dist_dml.data_config import ImageConfig
from dist_dml.models import embed_images
from dist_dml.models.embedder import Embedder
from dist_dml.models.export_formats import FILES, read_format
from dist_dml.models.export_module import example_images
from dist_dml.models.export_parity import BATCH_SIZES, TOLERANCE, check_parity

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return trained()


@pytest.fixture(scope="module")
def folder(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All formats, once for all tests: torch takes seconds for it."""
    return written(embedder, tmp_path_factory.mktemp("export"), tuple(FILES), True)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rows", [1, 3, 31])
def test_each_format_gives_the_networks_embeddings_in_any_batch(
    embedder: Embedder, folder: Path, name: str, rows: int
) -> None:
    images = torch.from_numpy(
        np.random.default_rng(rows).integers(0, 256, (rows, 12, 12, 1), np.uint8)
    )
    with torch.no_grad():
        expected = embedder(images.permute(0, 3, 1, 2))
    expected = expected / expected.norm(dim=1, keepdim=True)
    given = read_format(folder, name)(images.numpy())
    assert given.dtype == np.float32
    assert np.abs(given - expected.numpy()).max() < TOLERANCE
    assert np.ptp(given, axis=0).max() > 0.01 or rows == 1


def test_parity_says_how_near_each_format_is(embedder: Embedder, folder: Path) -> None:
    images = example_images(IMAGE, max(BATCH_SIZES), seed=1)
    found = check_parity(embedder, True, folder, tuple(FILES), images)
    assert set(found) == set(FILES)
    assert all(0 <= value < TOLERANCE for value in found.values())


def test_the_files_name_no_place_of_this_machine(folder: Path) -> None:
    places = [str(ROOT).encode(), b"site-packages", str(Path.home()).encode() + b"/"]
    for file in folder.iterdir():
        contents = [file.read_bytes()]
        if file.suffix == ".pt2":
            with zipfile.ZipFile(file) as archive:
                contents = [archive.read(name) for name in archive.namelist()]
        assert not any(place in content for place in places for content in contents), file


def test_the_onnx_file_has_one_free_dimension_and_says_how_images_are_prepared(
    folder: Path,
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["n", 12, 12, 1])
    assert (made.name, made.type, made.shape) == ("embeddings", "tensor(float)", ["n", 8])
    stored = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    assert stored == json.loads((folder / "preprocessing.json").read_text())
    with pytest.raises(Exception, match=r"[Gg]ot invalid dimensions"):
        session.run(None, {"images": np.zeros((1, 11, 12, 1), np.uint8)})


def test_the_example_embeds_files_without_torch_or_dist_dml(
    embedder: Embedder, folder: Path, tmp_path: Path
) -> None:
    paths = []
    for number in range(5):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(picture(20 + number, 31, ".png"))
    script = folder / "embed_images.py"
    script.write_text(Path(embed_images.__file__).read_text())
    code = (
        "import runpy, sys; "
        f"sys.argv = ['x', *{[str(p) for p in paths]!r}, '--out', {str(tmp_path / 'e.npy')!r}]; "
        f"runpy.run_path({str(script)!r}, run_name='__main__'); "
        "assert not {'torch', 'dist_dml'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "5 embeddings of 8 features" in done.stdout
    pixels = np.stack([evaluation_view(path.read_bytes(), IMAGE) for path in paths])
    with torch.no_grad():
        expected = embedder(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert np.abs(np.load(tmp_path / "e.npy") - expected.numpy()).max() < TOLERANCE


def test_the_example_names_a_file_that_is_no_image(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png: it is not a JPEG"):
        embed_images.embed_files(folder / "model.onnx", [tmp_path / "a.png"])


def test_a_transformer_exports_too(tmp_path: Path) -> None:
    image = ImageConfig(size=160, resize=160)
    model = ModelConfig(backbone="timm:test_vit.r160_in1k", embedding_dim=8, norm="layer")
    embedder = trained(model, image)
    folder = written(embedder, tmp_path / "export", tuple(FILES), False, model, image)
    found = check_parity(embedder, False, folder, tuple(FILES), example_images(image, 16))
    assert set(found) == set(FILES)
