"""The public Python API: what `import functa` offers, and what it promises."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import functa
from functa.storage.errors import StorageError
from functa.storage.images.source import open_images
from tests.helpers.flows.command import here
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.old_root import extract_old_root
from tests.helpers.tasks.encoded import encoded

PROJECT = Path(__file__).parents[1]
PUBLIC = {
    "load_config", "run", "encode", "decode", "sample", "classify",
    "Functaset", "open_reader", "load_field", "load_classifier", "load_denoiser",
}  # fmt: skip
IMAGES = np.linspace(0, 255, 5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8, 1)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a root whose stages have all finished, and images that its commands wrote."""
    return extract_old_root(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def root(old: Path) -> Path:
    return old / "root"


def python(code: str, folder: Path = PROJECT, timeout: float = 300) -> str:
    """Run code in a Python of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_offers_the_public_names_and_no_others() -> None:
    assert set(functa.__all__) == PUBLIC
    assert set(dir(functa)) == PUBLIC | {"__version__"}
    for name in functa.__all__:
        assert (getattr(functa, name).__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="no attribute 'enocde'"):
        functa.enocde  # type: ignore[attr-defined]


def test_the_version_is_the_same_everywhere() -> None:
    cited = yaml.safe_load((PROJECT / "CITATION.cff").read_text())["version"]
    assert functa.__version__ == metadata.version("spatial-functa") == cited == here("--version").stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "('torch', 'prefect', 'zarr', 'pydantic', 'numpy', 'yaml')"
    python(f"import functa, sys; dir(functa); assert not set({heavy}) & set(sys.modules), sys.modules")
    python("import functa, sys; functa.load_config('digits'); assert not {'torch', 'prefect'} & set(sys.modules)")


TYPED = """
import numpy as np
import functa

images = np.zeros((2, 8, 8, 1), np.uint8)
field = functa.load_field("root")
reveal_type(functa.encode(field, images))
reveal_type(functa.load_config("digits"))
functa.decode(field, functa.encode("root", images), resolution=16)
functa.run("digits", "root", ["field.width=32"])
functa.sample("root", "four")
functa.no_such_name
"""


@pytest.mark.slow  # a minute: the checker reads torch's types
def test_type_checkers_see_the_public_names(tmp_path: Path) -> None:
    """The last two lines of the file are wrong, and are all that is found."""
    (tmp_path / "user.py").write_text(TYPED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports",
         "--config-file=", f"--cache-dir={PROJECT / '.mypy_cache' / 'api'}", str(tmp_path / "user.py")],
        cwd=PROJECT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert 'user.py:7: note: Revealed type is "numpy.ndarray[' in done.stdout, done.stdout + done.stderr
    assert "user.py:8: note: Revealed type is" in done.stdout
    assert "PipelineConfig" in done.stdout
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in errors] == ["11", "12"], done.stdout


def test_encoding_an_array_gives_the_latents_that_the_functaset_stores(tmp_path: Path) -> None:
    config, job = encoded(tmp_path)
    stored = functa.Functaset.open(job.functaset).load("test")
    pixels = open_images(config.images).splits["test"].read(stored.source_rows).images
    for place in (job.functaset, tmp_path / "field"):
        z = functa.encode(place, pixels)
        assert z.dtype == np.float32
        np.testing.assert_allclose(z, stored.dequantized(), atol=1e-6)


def test_an_array_encodes_and_decodes_in_three_lines(root: Path) -> None:
    field = functa.load_field(root)
    z = functa.encode(field, IMAGES)
    images = functa.decode(field, z)
    assert repr(field) == "TrainedField(images 8x8x1 -> latents 2x2x8)"
    assert z.shape == (5, 2, 2, 8)
    assert images.shape == IMAGES.shape
    assert images.dtype == np.uint8
    floats = functa.decode(root, torch.from_numpy(z), dtype="float32")
    np.testing.assert_array_equal((floats.clip(0, 1) * 255).round().astype(np.uint8), images)
    assert functa.decode(field, z, resolution=24).shape == (5, 24, 24, 1)


def test_numpy_and_torch_bytes_and_floats_encode_alike(root: Path) -> None:
    field = functa.load_field(root)
    z = functa.encode(field, IMAGES)
    floats = IMAGES.astype(np.float32) / np.float32(255)
    for images in (torch.from_numpy(IMAGES), floats, torch.from_numpy(floats), IMAGES[:, :, ::-1][:, :, ::-1]):
        np.testing.assert_array_equal(functa.encode(field, images), z)
    np.testing.assert_allclose(functa.encode(field, IMAGES, batch=2), z, atol=1e-6)


def test_no_images_encode_to_no_latents_and_back(root: Path) -> None:
    z = functa.encode(root, IMAGES[:0])
    assert z.shape == (0, 2, 2, 8)
    assert functa.decode(root, z).shape == (0, 8, 8, 1)
    assert functa.classify(root, IMAGES[:0]) == []


WRONG: dict[str, tuple[Any, str]] = {
    "one image": (
        IMAGES[0],
        r"images of shape \[8, 8, 1\]: expected \[n, 8, 8, 1\]; .* \(one image is images\[None\]\)",
    ),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), r"shape \[5, 1, 8, 8\]: expected \[n, 8, 8, 1\]; resize"),
    "integers": (IMAGES.astype(np.int64), "images of type int64: expected uint8 .* or float32"),
    "doubles": (IMAGES / 255, "images of type float64"),
    "grey levels as floats": (IMAGES.astype(np.float32), "float32 images from 0 to 255: expected 0 to 1; rescale"),
    "not a number": (
        np.full((1, 8, 8, 1), np.nan, np.float32),
        "images contain NaN: expected numbers from 0 to 1",
    ),
    "objects": (IMAGES.astype(object), "images of type object"),
    "a list": (IMAGES.tolist(), "images of type list: expected a numpy array or a torch tensor"),
}


@pytest.mark.parametrize(("images", "message"), WRONG.values(), ids=WRONG)
def test_images_that_cannot_be_encoded_are_refused_in_one_line(images: Any, message: str, root: Path) -> None:
    field = functa.load_field(root)
    with pytest.raises(ValueError, match=message) as refused:
        functa.encode(field, images)
    assert "\n" not in str(refused.value)


def test_latents_and_resolutions_that_cannot_be_decoded_are_refused_in_one_line(root: Path) -> None:
    field = functa.load_field(root)
    z = np.zeros((2, 2, 2, 8), np.float32)
    with pytest.raises(ValueError, match=r"latents float32 of shape \[2, 32\]: expected float32 \[n, 2, 2, 8\]"):
        functa.decode(field, z.reshape(2, 32))
    with pytest.raises(ValueError, match="latents uint8 of shape"):
        functa.decode(field, z.astype(np.uint8))
    for resolution in (9, 0, -2):
        with pytest.raises(ValueError, match=f"resolution {resolution}: expected a multiple of 2"):
            functa.decode(field, z, resolution)


def test_a_folder_without_a_trained_model_is_named(tmp_path: Path) -> None:
    for load in (functa.load_field, functa.load_classifier, functa.load_denoiser):
        with pytest.raises(StorageError, match=str(tmp_path)):
            load(tmp_path)
        with pytest.raises(StorageError, match="digitz: no such folder; name the root of a run"):
            load(tmp_path / "digitz")


def test_samples_are_those_of_the_command(root: Path, old: Path) -> None:
    images = functa.sample(root, 4, label=2, seed=3)
    expected = [np.asarray(Image.open(path)) for path in sorted((old / "expected" / "samples").glob("sample-*.png"))]
    assert images.shape == (4, 8, 8, 1)
    assert np.abs(images[..., 0].astype(int) - np.stack(expected)).max() <= 1
    assert functa.sample(root, 1, steps=2, resolution=16).shape == (1, 16, 16, 1)
    with pytest.raises(ValueError, match="count=0: ") as refused:
        functa.sample(root, 0)
    assert "\n" not in str(refused.value)


def test_what_a_model_cannot_draw_and_a_device_that_is_not_there_are_refused_in_python_words(root: Path) -> None:
    with pytest.raises(StorageError, match="label 99: the model has classes 0 to 9"):
        functa.sample(root, 1, label=99)
    field, z = functa.load_field(root), np.zeros((1, 2, 2, 8), np.float32)
    calls = (
        lambda device: functa.encode(field, IMAGES, device=device),
        lambda device: functa.decode(field, z, device=device),
        lambda device: functa.sample(root, 1, device=device),
        lambda device: functa.classify(root, IMAGES, device=device),
    )
    for call in calls:
        assert len(call("cpu"))
        with pytest.raises(ValueError, match="device=gpu: choose among auto, cpu, cuda and cuda:N"):
            call("gpu")


def test_an_array_is_classified_as_the_files_of_its_images_are(root: Path, old: Path) -> None:
    folder = old / "expected" / "decoded"
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])[..., None]
    rows = functa.classify(root, images)
    assert [{"image": f"test-{number:06d}.png"} | row for number, row in enumerate(rows)] == functa.classify(
        root, folder
    )
    assert rows[0].keys() == {"class", "label", "probability", "top"}


def test_models_of_a_root_are_those_of_its_checkpoint_folders(root: Path) -> None:
    z = torch.from_numpy(functa.encode(root, IMAGES))
    for load, folder in ((functa.load_classifier, "classifier"), (functa.load_denoiser, "diffusion")):
        of_root, of_folder = load(root), load(root / "checkpoints" / folder)
        assert of_root.about == of_folder.about
        for name, value in of_root.model.state_dict().items():
            torch.testing.assert_close(value, of_folder.model.state_dict()[name], rtol=0, atol=0)
    model, normalizer, about = functa.load_classifier(root)
    assert model(normalizer.normalize(z)).shape == (5, about["classes"])


def test_a_reader_of_a_functaset_yields_its_latents(root: Path) -> None:
    functaset = functa.Functaset.open(str(root / "functaset.zarr"))
    reader = functa.open_reader(functaset, "train")
    assert reader.rows == functaset.rows("train")


RUN = """
import sys
import prefect  # before functa: its settings then do not come from the environment
import functa
from prefect.settings import PREFECT_SERVER_ANALYTICS_ENABLED, get_current_settings

if __name__ == "__main__":
    root, *overrides = sys.argv[1:]
    metrics = functa.run("digits", root, overrides)
    assert not PREFECT_SERVER_ANALYTICS_ENABLED.value()
    assert get_current_settings().server.ephemeral.startup_timeout_seconds == 120
    assert functa.run(functa.load_config("digits", overrides), root) == metrics
    print("psnr", metrics["psnr_test"])
"""


@pytest.mark.server
@pytest.mark.slow
def test_a_run_from_python_is_prepared_as_the_command_prepares_it(tmp_path: Path) -> None:
    """No telemetry, and time for a slow machine to start the server."""
    script = tmp_path / "mine.py"
    script.write_text(RUN)
    from tests.helpers.flows.prefect_server import clean_environment

    command = [sys.executable, str(script), str(tmp_path / "root"), *TINY, "classifier=null", "diffusion=null"]
    clean = clean_environment(tmp_path / "home")
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("psnr ")


def test_overrides_of_a_finished_config_are_refused() -> None:
    with pytest.raises(ValueError, match="pass them to load_config"):
        functa.run(functa.load_config("digits"), "root", ["field.width=32"])


def test_a_run_with_nothing_to_do_returns_the_metrics(root: Path) -> None:
    (config,) = root.glob("runs/*/config.yaml")
    python(
        f"import functa, sys; m = functa.run({str(config)!r}, {str(root)!r})\n"
        "assert m['psnr_test'] > 0; assert not {'torch', 'prefect'} & set(sys.modules)"
    )
