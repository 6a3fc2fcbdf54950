"""The report: one page that holds whatever was measured, from hostile names too, and asks the network for nothing."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from functa.tasks.report import artifacts, charts, files, pixels, words
from functa.tasks.report.blocks import ReportData
from functa.tasks.report.page import write_report

HOSTILE = '"><script src="http://evil.example/x.js">alert(1)</script><img src=x onerror=alert(1)>\' {{ 7*7 }} $\\frac'
VOID = {"meta", "img", "br", "link", "input", "hr"}
METRICS: dict[str, Any] = {
    "psnr_test": 30.84, "psnr_test_pooled": 29.92, "psnr_pca_patch": 18.8, "psnr_pca_image": 26.4,
    "psnr_by_bits": {"32": 31.2, "8": 31.1, "6": 29.4}, "mae_255": 5.3, "top1_test": 0.973, "ece": 0.012,
    "fd": {"classifier": 14.0, "latent": 0.8}, "fd_reconstruction": {"classifier": 2.0, "latent": 0.1},
    "fd_noise": {"classifier": 122.0, "latent": 9.0}, "locality": 1.0, "distinct": {"0": 88}, "bits_per_dim": 7.31,
    "rows": 1797, "bad_inputs": 1, "encode_images_per_s": 5123.4, "meta_images_per_s": 4000.0,
    "seconds_by_stage": {"meta_train": 61.3}, "parameters": {"field": 70529}, "fingerprint": "9f2c1b7a",
    "versions": {"torch": "2.11.0"}, "fd_counts": {"samples": 1000}, "something_new": [1, 2],
}  # fmt: skip


class Page(HTMLParser):
    """Reads a page; fails where a tag is closed that was not open, keeps what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, *names: str) -> list[str]:
        return [value or "" for _, attributes in self.tags for name, value in attributes.items() if name in names]


@pytest.fixture(scope="module")
def digits() -> tuple[pixels.Pixels, pixels.Pixels]:
    """Originals and reconstructions, [10, 8, 8, 1]."""
    originals = (load_digits().images[:10] / 16 * 255).astype(np.uint8)[..., None]
    noise = np.random.default_rng(0).normal(0, 8, originals.shape)
    return originals, np.clip(originals + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def full(digits: tuple[pixels.Pixels, pixels.Pixels]) -> ReportData:
    originals, reconstructions = digits
    steps = range(20, 2000, 20)
    return ReportData(
        title="digits",
        config={"name": "digits", "seed": 0, "encode": {"quantization": {"bits": 8}}, "images": {"location": ""}},
        metrics=METRICS,
        curves={
            "meta_train": [
                {"step": s, "loss": 1 / s, "psnr": 20 + s / 200, "lr": 1e-3, "seconds": s / 9} for s in steps
            ],
            "train_classifier": [
                {"step": 20, "loss": 1.2, "accuracy": 0.4},
                {"step": 40, "loss": 0.2, "accuracy": 0.9},
            ],
        },
        originals=originals,
        reconstructions=reconstructions,
        samples=originals[:5],
        sample_labels=[str(n) for n in range(5)],
        psnr_per_image=np.random.default_rng(1).normal(30, 2, 300),
        lineage=[{"what": "field", "digest": "0f1e2d3c", "made_from": ["a1b2"], "when": "now", "where": "here"}],
        bad_inputs=[{"key": "train/cat/broken.png", "reason": "cannot identify image file"}],
        stages=[{"stage": "meta_train", "state": "done", "seconds": 61.3}, {"stage": "encode", "state": "reused"}],
        created="2026-02-03T10:03:10Z",
        versions={"torch": "2.11.0"},
        command="functa run digits",
    )


def hostile(full: ReportData) -> ReportData:
    name = HOSTILE + "\x00\u202e\udcff"
    return dataclasses.replace(
        full, title=name, config={name: {name: name}}, metrics=METRICS | {name: {name: name}, "fingerprint": name},
        curves={name: [{"step": 1, "loss": 2.0, "loss" + name: 1.0}, {"step": 2, "loss": 1.0, "loss" + name: 3.0}]},
        sample_labels=[name] * 5, lineage=[{"what": name, name: name}], bad_inputs=[{"key": name, "reason": name}],
        stages=[{"stage": name, "state": name, "seconds": 1.0}], created=name, versions={name: name}, command=name,
    )  # fmt: skip


def test_every_part_is_on_the_page(full: ReportData) -> None:
    page = Page(write_report(full))
    assert not page.open
    for said in ("30.8", "patch PCA 18.8 dB", "97.3", "10 % of the way from floor to ceiling", "7.31", "5,123",
                 "quantised to 8 bits", "error × ",
                 "Meta-train the field", "broken.png", "0f1e2d3c", "quantization.bits"):  # fmt: skip
        assert said in page.text, said
    identifiers = page.attributes("id")
    assert len(identifiers) == len(set(identifiers))
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert sum(tag == "img" for tag, _ in page.tags) == 3 * 10 + 5


def test_hostile_names_are_text(full: ReportData) -> None:
    text = write_report(hostile(full))
    page = Page(text)
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "form", "link", "base"})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert {attributes["src"][:11] for tag, attributes in page.tags if tag == "img"} == {"data:image/"}
    assert text.count("alert(1)") == text.count("alert(1)&lt;/script&gt;") + text.count("onerror=alert(1)&gt;")
    text.encode()  # lone surrogates and NUL are spelt out
    assert "\x00" not in text and "\\x00" in text and "\\xdcff" in text
    assert all(re.fullmatch(r"s[0-9a-f]+-\S+|[a-z]+", identifier) for identifier in page.attributes("id"))


def test_the_page_asks_the_network_for_nothing(full: ReportData) -> None:
    text = write_report(full)
    page = Page(text)
    for address in page.attributes("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
        assert address.startswith(("data:image/png;base64,", "#")), address[:80]
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http:" not in without_namespaces and "https:" not in without_namespaces and "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_links_on_the_page_lead_somewhere(full: ReportData) -> None:
    for data in (full, ReportData(title="nothing yet")):
        page = Page(write_report(data))
        assert {link[1:] for link in page.attributes("href", "xlink:href")} <= set(page.attributes("id"))


def test_what_was_not_measured_is_absent() -> None:
    page = Page(write_report(ReportData(title="nothing yet")))
    assert not page.open
    assert "Nothing has been measured yet." in page.text and "No reconstructions were made." in page.text
    body = page.text[page.text.index("Headline") :]
    assert not re.search(r"\d", body), "a figure where nothing was measured"


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(ReportData) if f.name != "title"])
def test_each_part_may_be_missing(full: ReportData, part: str) -> None:
    empty = getattr(ReportData(title=""), part)
    assert not Page(write_report(dataclasses.replace(full, **{part: empty}))).open


def test_empty_pictures_and_odd_curves_do_no_harm(full: ReportData) -> None:
    none = np.zeros((0, 8, 8, 1), np.uint8)
    odd = {"encode": [], "a": [{"step": 1}], "b": [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": -1.0}]}
    data = dataclasses.replace(
        full, originals=none, reconstructions=none, samples=none, psnr_per_image=np.array([np.inf]), curves=odd
    )
    assert not Page(write_report(data)).open
    assert set(files.draw(data)) == {"curves_b.svg", "psnr_by_bits.svg"}


def test_equal_pictures_have_infinite_psnr(full: ReportData) -> None:
    assert "∞" in write_report(dataclasses.replace(full, reconstructions=full.originals))


def test_many_bad_inputs_are_counted_and_some_named(full: ReportData) -> None:
    bad = [{"key": f"bad-{n}", "reason": "unreadable"} for n in range(1234)]
    text = write_report(dataclasses.replace(full, bad_inputs=bad))
    assert "1,234 images were left out; the first 200 are named" in text and "bad-199" in text and "bad-200" not in text


def leaves(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [leaf for key, below in value.items() for leaf in leaves(below, f"{path}.{key}" if path else key)]
    return [path]


def test_metrics_show_everything_in_metrics_json(full: ReportData) -> None:
    shown = words.figures(METRICS)
    assert sorted(figure.key for figure in shown) == sorted(leaves(METRICS))
    assert len({figure.name for figure in shown}) == len(shown)
    rows = artifacts.metrics_table(METRICS)
    assert len(rows) == len(shown) and all(set(row) == {"metric", "value", "meaning"} for row in rows)
    assert {"metric": "PSNR, test", "value": "30.84 dB"}.items() <= rows[0].items()
    page = Page(write_report(full))
    assert all(figure.name in page.text and figure.value in page.text for figure in shown)


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (0.9733, "share", "97.3 %"), (1.0, "share", "100.0 %"), (0.99987, "share", "100 %"), (1797, "count", "1,797"),
        (61.3, "duration", "1 min 1 s"), (3725, "duration", "1 h 2 min"), (9.96, "duration", "10.0 s"),
        (59.7, "duration", "1 min 0 s"), (0.01234567, "plain", "0.01235"), (float("nan"), "dB", "not a number"),
        (float("inf"), "dB", "∞"), (5123.4, "rate", "5,123 images/s"), ("zstd", "dB", "zstd"), (True, "plain", "true"),
    ],
)  # fmt: skip
def test_values_read_as_a_person_says_them(value: Any, unit: str, said: str) -> None:
    assert words.show(value, unit) == said


def test_a_figure_nobody_measured_makes_no_row() -> None:
    assert artifacts.metrics_table({"fid": None, "psnr_test": 1.0, "fd": {}}) == artifacts.metrics_table(
        {"psnr_test": 1.0}
    )


def test_lineage_rows_have_equal_columns() -> None:
    rows = artifacts.lineage_table(
        [{"digest": "b", "what": "field", "extra": {"a": 1}}, {"what": "x", "made_from": ["b", "c"]}]
    )
    assert [list(row) for row in rows] == [["what", "digest", "made_from", "extra"]] * 2
    assert rows[1] == {"what": "x", "digest": "", "made_from": "b, c", "extra": ""}


def pictures(markdown: str) -> list[Image.Image]:
    found = re.findall(r"!\[[^\]]*\]\((data:image/png;base64,[^)]*)\)", markdown)
    assert all(len(uri) < 60_000 for uri in found)
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in found]


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3), (256, 3)])
def test_artifact_pictures_are_small_enough_to_store_and_large_enough_to_see(side: int, channels: int) -> None:
    noise = np.random.default_rng(0).integers(
        0, 256, (16, side, side, channels), dtype=np.uint8
    )  # the worst to compress
    shown = pictures(artifacts.reconstruction_markdown(noise, noise[::-1], np.zeros(16)))
    shown += pictures(artifacts.samples_markdown(noise, ["a"] * 16))
    assert len(shown) == 2 * 3 + 2
    for picture in shown:
        assert picture.height >= 32 and picture.width >= 8 * 32


def test_artifacts_enlarge_digits_without_smoothing(digits: tuple[pixels.Pixels, pixels.Pixels]) -> None:
    originals, reconstructions = digits
    picture = pictures(artifacts.reconstruction_markdown(originals, reconstructions, np.zeros(10)))[0]
    assert picture.height == 64
    np.testing.assert_array_equal(np.asarray(picture)[::8, :64:8], originals[0, :, :, 0])


def test_class_names_in_markdown_do_nothing(digits: tuple[pixels.Pixels, pixels.Pixels]) -> None:
    names = [
        "![x](http://evil.example/a.png)",
        "<script>",
        "a\n# b",
        "www.evil.example",
        "[a](b)",
        "`x`|*y*_z_",
        "\u202eabc",
    ]
    line = artifacts.samples_markdown(digits[0][: len(names)], names).splitlines()[-1]
    assert line.startswith("Classes, from left to right: ")
    rest = re.sub(r"&#\d+;", "", line)
    assert re.fullmatch(r"[\w ,:·]*", rest), rest
    assert "://" not in line and "www.evil" not in line


def test_artifacts_without_pictures_say_so() -> None:
    none = np.zeros((0, 8, 8, 1), np.uint8)
    assert "No pictures" in artifacts.reconstruction_markdown(none, none, [])
    assert "No samples" in artifacts.samples_markdown(none)


def test_errors_are_amplified_as_far_as_they_can_stand() -> None:
    black = np.zeros((1, 8, 8, 1), np.uint8)
    for error, factor in ((0, 32), (7, 32), (8, 16), (60, 4), (127, 2), (255, 1)):
        assert pixels.amplification(black, black + np.uint8(error)) == factor
    np.testing.assert_array_equal(pixels.errors(black + np.uint8(200), black, 4), 255)


def test_psnr_of_pictures_is_the_closed_form() -> None:
    black = np.zeros((1, 4, 4, 3), np.uint8)
    np.testing.assert_allclose(pixels.psnr(black, black + np.uint8(51)), -20 * np.log10(0.2))


@pytest.mark.parametrize(
    ("shape", "least", "most", "got"),
    [
        ((8, 8), 64, 64, (64, 64)),
        ((28, 20), 64, 256, (84, 60)),
        ((300, 200), 64, 150, (150, 100)),
        ((65, 65), 64, 64, (64, 64)),
    ],
)
def test_pictures_are_fitted_whole(shape: tuple[int, int], least: int, most: int, got: tuple[int, int]) -> None:
    assert pixels.fit(np.zeros((*shape, 3), np.uint8), least, most).shape == (*got, 3)


def test_pictures_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        pixels.png(np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(ValueError, match="differ in shape"):
        pixels.psnr(np.zeros((1, 4, 4, 1), np.uint8), np.zeros((2, 4, 4, 1), np.uint8))


def test_every_picture_is_a_file_of_the_run(full: ReportData) -> None:
    drawn = files.draw(full)
    assert set(drawn) == {"curves_meta_train.svg", "curves_train_classifier.svg", "psnr_histogram.svg",
                          "psnr_by_bits.svg", "reconstructions.png", "samples.png"}  # fmt: skip
    for name, content in drawn.items():
        if name.endswith(".png"):
            Image.open(io.BytesIO(content)).verify()
        else:
            assert b"</svg>" in content and b"<metadata>" not in content
    assert files.draw(full) == drawn  # equal data, equal bytes


def test_file_names_and_captions_of_hostile_names_are_harmless(full: ReportData) -> None:
    names = files.draw(hostile(full))
    assert all(re.fullmatch(r"\w+\.(svg|png)", name) for name in names)


def test_charts_leave_pyplot_and_its_settings_alone(full: ReportData) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    files.draw(full)
    assert dict(matplotlib.rcParams) == before


def test_a_resumed_run_draws_each_step_once() -> None:
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    assert charts.curves(rows) == charts.curves([rows[0], rows[2], rows[3]])


def classified(full: ReportData, names: list[str], empty: int | None = None) -> ReportData:
    """With a classifier's figures: class k is taken for the next one in a tenth of its images."""
    classes = len(names)
    confusion = np.diag(np.full(classes, 90)) + np.roll(np.diag(np.full(classes, 10)), 1, axis=1)
    if empty is not None:
        confusion[empty] = 0
    count = np.array([0, 0, *range(1, 14)])
    share = np.linspace(0, 1, 15)
    arrays = {"confusion": confusion, "bin_count": count, "bin_confidence": share, "bin_accuracy": share**2}
    return dataclasses.replace(full, classes=names, arrays={"classification": arrays})


def test_the_classes_have_a_matrix_a_diagram_and_a_table(full: ReportData) -> None:
    data = classified(full, [f"kind {n}" for n in range(10)], empty=4)
    page = Page(write_report(data))
    assert not page.open
    for said in ("Classification", "kind 3", "no test images", "kind 6 (10.0 %)",
                 "Without test images, so without an accuracy: kind 4.",
                 "calibration error 1.2 %"):  # fmt: skip
        assert said in page.text, said
    drawn = files.draw(data)
    assert {"confusion.svg", "reliability.svg", "classes.csv"} <= set(drawn)
    assert drawn["classes.csv"].decode().splitlines()[-1] == "kind 4,0,no test images,"


def test_of_many_classes_the_worst_pairs_are_listed(full: ReportData) -> None:
    drawn = files.draw(classified(full, [f"kind {n}" for n in range(21)]))
    assert "confusion.svg" not in drawn
    rows = drawn["confused_pairs.csv"].decode().splitlines()
    assert len(rows) == 1 + 20 and rows[1] == "kind 0,kind 1,10,10.0 %"


def test_hostile_class_names_stay_text_in_figures_and_files(full: ReportData) -> None:
    names = [f"{HOSTILE} {n}" for n in range(3)] + ["\ud800", "$x_1", "=1+1"]
    data = hostile(classified(full, names))
    data.metrics["accuracy_by_class"] = dict.fromkeys(names, 0.9)
    page = Page(write_report(data))
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "form", "link", "base"})
    for content in files.draw(data).values():
        assert b"<script" not in content or b"</svg>" not in content


def test_accuracies_of_many_classes_stand_in_their_own_table_alone() -> None:
    few, many = ({str(n): 0.5 for n in range(count)} for count in (20, 21))
    assert len(words.figures({"accuracy_by_class": few})) == 20
    assert words.figures({"accuracy_by_class": many}) == []


GENERATED: dict[str, Any] = METRICS | {
    "fd": {"classifier": 14.0}, "kd": {"classifier": -0.001, "latent": 0.2}, "duplicates": 3,
    "precision": {"classifier": 0.5, "latent": 0.25}, "recall": {"classifier": 0.75, "latent": 1.0},
    "fd_reference": {"images": "train", "count": 1497, "samples": 100, "dimensions": {"classifier": 64, "latent": 128},
                     "subset": {"classifier": 100, "latent": 100}},
}  # fmt: skip


def test_the_table_of_feature_spaces_says_what_is_missing_and_why(full: ReportData) -> None:
    page = Page(write_report(dataclasses.replace(full, metrics=GENERATED)))
    for said in ("No Fr\u00e9chet distance of latents: 100 samples, 128 dimensions are too few for a covariance.",
                 "3 of the samples repeat another one", "pixel-classifier features", "75.0 %"):  # fmt: skip
        assert said in page.text, said
    table = files.draw(dataclasses.replace(full, metrics=GENERATED))["generation.csv"].decode().splitlines()
    assert table == [
        "Features,pixel-classifier features,latents", "Fr\u00e9chet distance,14,",
        "\u2026 of reconstructions (floor),2,0.1", "\u2026 of noise latents (ceiling),122,9",
        "Kernel distance,-0.001,0.2", "Precision,50.0 %,25.0 %", "Recall,75.0 %,100.0 %", "Dimensions,64,128",
        "Compared one by one,100,100",
    ]  # fmt: skip


def test_fid_stands_with_its_protocol_and_floor(full: ReportData) -> None:
    reference = {"images": "train", "count": 50_000, "samples": 50_000, "dimensions": {"inception": 2048}}
    protocol = {"weights": "6726825d" + "0" * 56, "resize": "as in TensorFlow 1", "batch": 64}
    metrics = {"fid": 16.5, "fid_reconstruction": 4.2, "fid_protocol": protocol, "fd_reference": reference, "fd": {}}
    page = Page(write_report(dataclasses.replace(full, metrics=metrics)))
    for said in ("Inception features: FID", "FID: weights sha256 6726825d00000000", "as in TensorFlow 1",
                 "reconstructions (floor) 4.2"):  # fmt: skip
        assert said in page.text, said
    other = metrics | {"inception_protocol": protocol, "fd": {"inception": 16.5}}
    del other["fid"], other["fid_protocol"], other["fid_reconstruction"]
    told = Page(write_report(dataclasses.replace(full, metrics=other))).text
    assert "Inception features, not FID: weights sha256 6726825d" in told
    assert "FID" not in told.replace("not FID", "")
