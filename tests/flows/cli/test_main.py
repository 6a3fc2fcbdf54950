"""The command: exit statuses, errors in one line, answers in JSON."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.flows.command import PROJECT, error_line, functa, here
from tests.helpers.flows.tiny_config import TINY
from tests.helpers.storage.functasets import fill, filled, plan


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["run", "digitz"], 2, "did you mean 'digits'"),
        (["run", "digits", "--set", "field.widht=3"], 2, "did you mean 'field.width'"),
        (["run", "digits", "--set", "meta_train.steps=-1"], 2, "meta_train.steps"),
        (["run", "digits", "--nope"], 2, "--nope"),
        (["run", "digits", "--resolution", "64"], 2, "unknown option --resolution: use --set images.resolution=VALUE"),
        (
            ["show", "digits", "--steps=64"],
            2,
            "unknown option --steps: use --set inner.steps=VALUE (or meta_train.step",
        ),
        (["run", "digits", "--rot", "x"], 2, "did you mean --root?"),
        (["classify", "/no/such/root", "x"], 1, "no run has been started there; name the root of a run"),
        (["run"], 2, "functa: run needs PRESET: a preset's name (see `functa presets`) or a YAML file"),
        (["sample", "--out", "x"], 2, "functa: sample needs ROOT: a run's root with a trained diffusion model"),
        (["run", "digits", "field.width=3"], 2, "did you mean --set field.width=3?"),
        (["status", "x", "field.width=3"], 2, "unexpected argument field.width=3 (functa status --help)"),
        (
            ["encode", "digits", "--set", *(f"images.location=/d/{number:03}.tar" for number in range(3))],
            2,
            "unexpected argument images.location=/d/001.tar: images.location is given 3 times; where the shell made "
            "several words of a pattern in braces, quote it: --set 'images.location=.../{000..127}.tar'",
        ),
        (["run", "digits", "--set", "meta_train.steps=30"], 2, "set meta_train.warmup to at most 30"),
        (["run", "digits", "--root", "/proc/x"], 1, "cannot write to /proc/x: this folder cannot be created"),
        (["rnu", "digits"], 2, "rnu"),
        (["up", "--port", "99999"], 2, "99999"),
        (["status", "/no/such/root"], 1, "no run has been started there"),
        (["store", "info", "/no/such/store"], 1, "/no/such/store"),
        (["store", "gc", "/no/such/store"], 1, "/no/such/store"),
        (["store", "gc", "/no/such/store", "--keep-versions", "0"], 2, "--keep-versions 1 or more"),
        (["store", "gc", "/no/such/store", "--older-than", "nan"], 2, "--older-than is 0 or more hours"),
        (["store", "compact", "/no/such/store"], 1, "/no/such/store: no functaset"),
        (["store", "retire", "/no/such/store"], 2, "name one image at least"),
        (["store", "retire", "/no/such/store", "some/image.png"], 1, "/no/such/store"),
        (["store", "quantize", "/no/such/store", "/no/such/other", "--bits", "6"], 1, "/no/such/store: no functaset"),
        (["store", "quantize", "/no/such/store", "/no/such/other"], 2, "--bits"),
        (["store", "quantize", "/no/such/store", "/no/such/other", "--bits", "9"], 2, "--bits"),
        (["store", "quantize", "/no/such/store", "/no/such/other", "--bits", "6", "--range", "auto"], 2, "--range"),
        (["store", "quantize", "/no/such/store", "/no/such/other", "--bits", "6", "--quantile", "2"], 2, "--quantile"),
        (["decode", "/no/such/store", "--rows", "3", "--out", "x"], 2, "START:STOP"),
        (["decode", "/no/such/store", "--rows", "²:³", "--out", "x"], 2, "START:STOP"),
        (["decode", "/no/such/store", "--rows", f"0:{'9' * 5000}", "--out", "x"], 2, "START:STOP"),
        (["decode", "/no/such/store", "--split", "foo", "--out", "x"], 2, "--split"),
        (["decode", "/no/such/store", "--resolution", "0", "--out", "x"], 2, "--resolution"),
        (["decode", "/no/such/store", "--resolution", "-8", "--out", "x"], 2, "--resolution"),
        (["sample", "/no/such/root", "--out", "x"], 1, "/no/such/root"),
        (["sample", "/no/such/root", "--resolution", "0", "--out", "x"], 2, "--resolution"),
        (["sample", "/no/such/root", "--guidance", "-1", "--out", "x"], 2, "--guidance -1"),
        (["sample", "/no/such/root", "--guidance", "nan", "--out", "x"], 2, "--guidance nan"),
        (["sample", "/no/such/root", "--count", "0", "--out", "x"], 2, "--count 0"),
        (["sample", "/no/such/root", "--sampler", "euler", "--out", "x"], 2, "--sampler"),
        (["sample", "/no/such/root", "--steps", "1", "--out", "x"], 2, "--steps 1"),
        (["sample", "/no/such/root", "--steps", "10001", "--out", "x"], 2, "--steps 10001"),
        (["sample", "/no/such/root", "--steps", "1.5", "--out", "x"], 2, "--steps"),
        (["run", "digits", "--set", "inner.compile=maybe"], 2, "'auto', 'on' or 'off'"),
        (["run", "/tmp/"], 2, "unknown preset '/tmp/'"),
        (["run", "digits", "--root", "ftp://somewhere"], 1, "ftp"),
        (["encode", "digits", "--root", "/tmp/no-such-functa-root"], 1, "run `functa meta-train digits` first"),
    ],
)
def test_a_fault_is_one_line_and_its_exit_status(arguments: list[str], status: int, line: str) -> None:
    assert line.lower() in error_line(here(*arguments), status).lower()


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["run", "digitz"], 2, "did you mean 'digits'"),
        (["store", "info", "/no/such/store"], 1, "/no/such/store"),
        (["sample", "/no/such/root", "--out", "x"], 1, "/no/such/root"),
        (["encode", "digits", "--root", "/tmp/no-such-functa-root"], 1, "run `functa meta-train digits` first"),
    ],
)
def test_no_loaded_library_adds_a_line(arguments: list[str], status: int, line: str) -> None:
    """In a process of its own: a warning while a library is loaded would appear."""
    assert line.lower() in error_line(functa(*arguments), status).lower()


@pytest.mark.parametrize("case", ["missing", "empty", "flat"])
def test_a_wrong_image_folder_is_one_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    images, root = tmp_path / "images", tmp_path / "root"
    if case != "missing":
        images.mkdir()
    if case == "flat":
        Image.new("L", (8, 8)).save(images / "a.png")
    done = here("run", "digits", "--set", "images.source=folder", "--set", f"images.location={images}",
                  "--root", str(root))  # fmt: skip
    assert str(images) in error_line(done, 1)
    assert not root.exists()


def test_a_field_that_does_not_fit_the_images_is_a_fault_of_the_config(tmp_path: Path) -> None:
    root = tmp_path / "root"
    done = here("run", "digits", "--set", "field.spatial=3", "--root", str(root))
    assert "not divisible into 3x3 latent positions" in error_line(done, 2)
    assert not root.exists()


@pytest.mark.parametrize(
    ("field", "line"),
    [
        (["field.spatial=5"], "12x12 pixels are not divisible into 5x5 latent positions"),
        (["field.coordinates=binary"], "powers of two, not 12"),
    ],
)
def test_a_field_that_does_not_fit_images_of_unknown_size_is_reported_before_any_work(
    field: list[str], line: str, tmp_path: Path
) -> None:
    images, root = tmp_path / "images", tmp_path / "root"
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12)).save(images / f"{name}.png")
    sets = ["images.source=folder", f"images.location={images}", *field]
    done = here("run", "digits", *(part for s in sets for part in ("--set", s)), "--root", str(root))
    assert str(images) in error_line(done, 1)
    assert line in error_line(done, 1)
    assert not root.exists()


def test_a_stage_that_the_config_does_not_have_is_refused(tmp_path: Path) -> None:
    done = here("train-classifier", "digits", "--set", "classifier=null", "--root", str(tmp_path / "root"))
    assert "digits: has no train-classifier stage" in error_line(done, 2)


def test_show_warns_of_a_latent_larger_than_its_image() -> None:
    overrides = ["--set", "field.channels=32", "--set", "classifier=null", "--set", "diffusion=null"]
    done = here("show", "digits", *overrides)
    assert done.stdout.count("128 numbers, more than the 64 values") == 1
    shown = json.loads(here("show", "digits", *overrides, "--json").stdout)
    assert shown["config"]["classifier"] is None
    assert set(shown["digests"]) == {"meta_train", "encode", "evaluate"}
    assert shown["parameters"]["classifier"] is None
    assert len(shown["warnings"]) == 1


def test_a_root_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to" in error_line(here("run", "digits", "--root", str(tmp_path / "file" / "root")), 1)


def test_debug_adds_the_traceback() -> None:
    done = functa("run", "digitz", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_show_answers_in_json() -> None:
    shown = json.loads(functa("show", "digits", "--json").stdout)
    assert shown["config"]["field"]["spatial"] == 2
    assert set(shown["digests"]) == {"meta_train", "encode", "train_classifier", "train_diffusion", "evaluate"}
    assert shown["parameters"]["field"] > 0
    assert shown["estimate"]["store_bytes"] == 1797 * 32


def test_a_functaset_is_quantised_from_the_shell(tmp_path: Path) -> None:
    filled(tmp_path / "a", bits=32)
    command = ["store", "quantize", str(tmp_path / "a"), str(tmp_path / "b"), "--bits", "6", "--max-clip-fraction", "1"]
    made = json.loads(functa(*command, "--json").stdout)
    assert (made["bits"], made["rows_by_split"]) == (6, {"train": 20, "test": 6})
    assert json.loads(here("store", "info", str(tmp_path / "b"), "--json").stdout) == made
    again = here(*command)
    assert again.returncode == 0, again.stderr
    for printed in (
        "6 asked for",
        "minmax, margin 0.1, per element",
        "PSNR before quantisation",
        "requantised_f",
    ):
        assert printed in again.stdout
    assert "quantization.bits: 6 -> 5" in error_line(here(*command[:-3], "5"), 1)
    assert "6 bits a number, which 7 cannot better" in error_line(
        here(*command[:2], str(tmp_path / "b"), "x", "--bits", "7"), 1
    )


def test_small_fragments_are_merged_from_the_shell(tmp_path: Path) -> None:
    place = filled(tmp_path / "s")
    more = plan(place, n=5, first=20)
    fill(place, [more])
    done = here("store", "compact", str(tmp_path / "s"))
    assert done.returncode == 0, done.stderr
    assert "version 3: 2 fragments of 25 rows are now 1; functa store gc --keep-versions 1 --delete" in done.stdout
    answer = json.loads(here("store", "compact", str(tmp_path / "s"), "--json").stdout)
    assert answer == {"merged": [], "made": [], "rows": 0, "version": 3}
    assert "nothing to merge" in here("store", "compact", str(tmp_path / "s")).stdout


def test_presets_are_listed_without_building_a_model() -> None:
    code = (
        "import sys; from functa.flows.cli.main import _guarded; status = _guarded(['presets'], False); "
        "assert not {'torch', 'prefect'} & set(sys.modules), 'something heavy was loaded'; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines()) if words}
    assert lines["photos_64"][:6] == ["photos", "64", "8x8x16", "15", "min", "on"]
    assert " ".join(lines["paper_cifar10_8x8x16"]) == "cifar10 32 8x8x16 14 h 37.2 90.3 16.5 11.2 Table 2 row 1"
    names = list(lines)
    assert names.index("digits") < names.index("paper_celeba_64x64_64")


def test_help_groups_the_commands() -> None:
    words = here("--help").stdout.split()
    order = [words.index(word) for word in ("Run", "sweep", "Use", "decode", "Look", "presets", "Operate", "up")]
    assert order == sorted(order)


def test_presets_answer_in_json() -> None:
    presets = {preset["name"]: preset for preset in json.loads(here("presets", "--json").stdout)}
    assert presets["digits"]["latent"] == "2x2x8"
    assert presets["cifar10_quick"]["latent"] == "8x8x16"
    assert all(preset["parameters"]["field"] for preset in presets.values())


@pytest.mark.server
@pytest.mark.slow
def test_a_run_from_the_shell_and_commands_on_it(tmp_path: Path) -> None:
    """On Prefect's embedded server, with a damaged image among good ones."""
    images, root = tmp_path / "images", tmp_path / "root"
    write_digits(images, damaged="train/3/damaged.png")
    sets = [
        "images.source=folder",
        f"images.location={images}",
        "images.channels=1",
        *TINY[1:],
        "evaluation.samples=60",
    ]
    command = ["run", "digits", *(part for s in sets for part in ("--set", s)), "--root", str(root)]
    done = functa(*command, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    metrics = json.loads((root / "metrics.json").read_text())
    assert metrics["bad_inputs"] == 1
    assert "damaged.png" in (root / "report.html").read_text()

    status = json.loads(here("status", str(root), "--json").stdout)
    assert set(status["stages"].values()) == {"finished"}
    assert status["shards"]["left"] == 0
    assert status["shards"]["bad"] == 1
    info = json.loads(here("store", "info", str(root), "--json").stdout)
    assert info["rows_by_split"] == {"train": 119, "test": 60}
    assert json.loads(here("store", "verify", str(root), "--deep", "--json").stdout)["bad"] == []

    out = tmp_path / "out"
    assert functa("decode", str(root), "--rows", "0:3", "--resolution", "32", "--out", str(out)).returncode == 0
    assert [Image.open(p).size for p in sorted(out.glob("test-*.png"))] == [(32, 32)] * 3
    assert functa("sample", str(root), "--count", "5", "--label", "3", "--out", str(out)).returncode == 0
    assert len(list(out.glob("sample-*.png"))) == 5
    assert (out / "contact-sheet.png").exists()
    assert "classes 0 to 9" in error_line(here("sample", str(root), "--label", "10", "--out", str(out)), 1)

    check_a_root_that_reuses_a_functaset(root, tmp_path / "reusing", command)

    again = here(*command)
    assert "everything is up to date" in again.stdout
    other = here(*command, "--set", "classifier.steps=30")
    assert "classifier.steps: 20 -> 30" in error_line(other, 1)

    shard = next((root / "functaset.zarr" / "fragments").glob("*/z/c/*/*/*/*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    spoilt = here("store", "verify", str(root))
    assert spoilt.returncode == 1
    assert str(shard.relative_to(root / "functaset.zarr")) in spoilt.stdout
    check_a_damaged_root_is_repaired(root, command)


def check_a_damaged_root_is_repaired(root: Path, command: list[str]) -> None:
    """Repair it by encoding again; then retire an image and erase it."""
    options = command[2:]
    decoded = [
        here("decode", str(root), "--split", split, "--rows", rows, "--out", str(root / "out"))
        for split, rows in (("train", "0:119"), ("test", "0:60"))
    ]
    broken = next(each for each in decoded if each.returncode)
    assert "or encode its rows again: functa encode PRESET --repair" in error_line(broken, 1)
    record = (root / "stages" / "encode.json").read_bytes()
    other = here("encode", command[1], *options, "--repair", "--set", "encode.shard_rows=512")
    assert "encode.shard_rows: " in error_line(other, 1)
    assert (root / "stages" / "encode.json").read_bytes() == record
    repaired = functa("encode", command[1], *options, "--repair")
    assert repaired.returncode == 0, repaired.stderr
    # A repair looks for nothing new, so that the next encoding does.
    versions = sorted((root / "functaset.zarr" / "commits").glob("*.json"))
    looked = functa("encode", command[1], *options)
    assert looked.returncode == 0, looked.stderr
    assert sorted((root / "functaset.zarr" / "commits").glob("*.json")) == versions
    assert "is up to date" in here("encode", command[1], *options).stdout
    assert here("store", "verify", str(root), "--deep").returncode == 0
    assert "shows no image 'none.png'" in error_line(
        here("store", "retire", str(root), "none.png", "--split", "test"), 1
    )
    from functa.storage.functaset.functaset import Functaset

    store = str(root / "functaset.zarr")
    keys = Functaset.open(store).load("test").keys
    assert "rows" in here("store", "retire", str(root), keys[0], "--split", "test").stdout
    would = here("store", "gc", str(root), "--erase-retired")
    assert "--delete does it" in would.stdout
    done = json.loads(here("store", "gc", str(root), "--erase-retired", "--delete", "--json").stdout)
    assert done["deleted"]
    assert len(done["rewritten"]) >= 1
    assert sorted(Functaset.open(store).load("test").keys) == sorted(keys[1:])
    assert here("store", "verify", str(root), "--deep").returncode == 0


@pytest.mark.server
@pytest.mark.slow
def test_a_run_without_classifier_and_diffusion(tmp_path: Path) -> None:
    """Neither is started, missed or reported; a latent larger than its image is allowed, with one warning."""
    root = tmp_path / "root"
    sets = [s for s in TINY if not s.startswith(("classifier.", "diffusion."))]
    sets += ["classifier=null", "diffusion=null", "field.channels=32"]
    command = ["run", "digits", *(part for s in sets for part in ("--set", s)), "--root", str(root)]
    done = functa(*command, timeout=280)
    assert done.returncode == 0, done.stderr
    printed = " ".join((done.stdout + done.stderr).split())
    assert printed.count("128 numbers, more than the 64 values") == 1
    metrics = json.loads((root / "metrics.json").read_text())
    assert "psnr_test" in metrics
    assert not {"top1_test", "fd", "fd_noise", "top1_pixels"} & metrics.keys()
    assert set(metrics["parameters"]) == {"field"}
    assert not (root / "checkpoints" / "classifier").exists()
    assert "Train the classifier" not in (root / "report.html").read_text()
    status = json.loads(here("status", str(root), "--json").stdout)
    assert status["stages"] == dict.fromkeys(("meta_train", "encode", "evaluate"), "finished")
    assert "everything is up to date" in here(*command).stdout


def check_a_root_that_reuses_a_functaset(other: Path, root: Path, command: list[str]) -> None:
    """A root made with --from has no functaset of its own: commands on it read the other root's."""
    preset, options = command[1], command[2 : command.index("--root")]
    reused = functa("encode", preset, *options, "--root", str(root), "--from", str(other))
    assert reused.returncode == 0, reused.stderr
    assert not (root / "functaset.zarr").exists()
    ours, theirs = (here("store", "info", str(place), "--json").stdout for place in (root, other))
    assert json.loads(ours) == json.loads(theirs)
    assert json.loads(here("store", "verify", str(root), "--json").stdout)["bad"] == []
    assert here("decode", str(root), "--rows", "0:2", "--out", str(root / "out")).returncode == 0
    assert len(list((root / "out").glob("test-*.png"))) == 2


@pytest.mark.faults
@pytest.mark.server
def test_more_bad_images_than_allowed_fail_the_run_in_one_line(tmp_path: Path) -> None:
    """Beside Prefect's log the error is printed once, without a traceback."""
    images, root = tmp_path / "images", tmp_path / "root"
    write_digits(images, damaged="train/3/damaged.png")
    for label in range(10):
        (images / "train" / str(label) / "001.png").write_bytes(b"\x89PNG, but not for long")
    sets = [
        "images.source=folder",
        f"images.location={images}",
        "images.channels=1",
        "images.max_bad_fraction=0.0",
        *TINY[1:],
    ]
    done = functa("run", "digits", *(part for s in sets for part in ("--set", s)), "--root", str(root), timeout=200)
    assert done.returncode == 1, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("functa: "))
    assert "11 of 120 train images cannot be used, more than images.max_bad_fraction=0 allows" in line
    assert '  File "' not in done.stderr
    assert not (root / "metrics.json").exists()


def write_digits(folder: Path, damaged: str, per_class: tuple[int, int] = (12, 6)) -> None:
    """Real digits as PNG files in class folders, and a file that is no image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        images = digits.images[digits.target == label]
        for split, part in (("train", images[: per_class[0]]), ("test", images[per_class[0] : sum(per_class)])):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for i, image in enumerate(part):
                Image.fromarray((image * 255 / 16).round().astype("uint8")).save(place / f"{i:03d}.png")
    shutil.copy(folder / "train" / "3" / "000.png", folder / damaged)
    data = (folder / damaged).read_bytes()
    (folder / "train" / "3" / "000.png").unlink()
    (folder / damaged).write_bytes(data[: len(data) // 2])
