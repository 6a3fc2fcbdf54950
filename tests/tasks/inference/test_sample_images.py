"""The class that is drawn: a name comes before a number."""

import pytest

from functa.storage.errors import StorageError
from functa.tasks.inference.sample_images import class_number

FOLDERS = sorted(str(number) for number in range(12))  # 0, 1, 10, 11, 2, ...


def test_a_class_folder_called_2_is_what_label_2_draws() -> None:
    assert FOLDERS[2] == "10"
    for name in FOLDERS:
        assert class_number(name, FOLDERS, "root") == FOLDERS.index(name)


def test_text_that_is_no_name_is_a_number() -> None:
    assert class_number("1", ["cat", "dog"], "root") == 1
    assert class_number("dog", ["cat", "dog"], "root") == 1
    assert class_number(1, ["1", "0"], "root") == 1  # a number is one
    assert class_number(None, ["cat"], "root") is None
    assert class_number("3", [], "root") is None


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("dgo", "label dgo: root has no class of that name; did you mean dog"),
        ("-1", "label -1: root has no class of that name; did you mean cat or dog"),
        ("\u0663", "has no class of that name"),
        ("2", "label 2: the model has classes 0 to 1"),
        (7, "label 7: the model has classes 0 to 1"),
    ],
)
def test_a_class_that_the_model_does_not_have_is_one_line(label: int | str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        class_number(label, ["cat", "dog"], "root")
