"""Labels as text: which are class numbers, which are names, and which are refused."""

import pytest

from functa.storage.images.labels import numbered


def test_whole_numbers_are_classes_whatever_images_come() -> None:
    numbers, classes = numbered(["3", "0", "3"])
    assert (numbers.tolist(), classes) == ([3, 0, 3], ["0", "1", "2", "3"])
    numbers, classes = numbered(["007", "003"])
    assert (numbers.tolist(), len(classes)) == ([7, 3], 8)


@pytest.mark.parametrize("labels", [["7", "007"], ["0", "-0"], ["1", "2", "01"]])
def test_a_number_that_is_written_in_two_ways_is_refused(labels: list[str]) -> None:
    """They could be two classes, which would become one."""
    with pytest.raises(ValueError, match=r"are one number; write them alike"):
        numbered(labels)
    with pytest.raises(ValueError, match=r"are one number; write them alike"):
        numbered(labels, ["a", "b", "c", "d", "e", "f", "g", "h"])


def test_labels_of_which_one_is_no_number_are_names() -> None:
    for labels in (["7", "007", "x"], ["null", "NaN", "None", "true"], ["1.0", "1"], ["Cat", "cat"]):
        numbers, classes = numbered(labels)
        assert classes == sorted(labels)
        assert [classes[i] for i in numbers] == labels


def test_a_label_below_0_is_refused_with_what_it_often_means() -> None:
    with pytest.raises(ValueError, match=r"label -1 is none of the classes .*; leave out images without labels"):
        numbered(["1", "-1"])
