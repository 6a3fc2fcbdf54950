"""The page on trackers: its run, as written, leaves curves that TensorBoard reads."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.docs.pages import DOCS, Block, blocks
from tests.helpers.docs.reader import furnish, run_block

PAGE = DOCS / "how-to/track.md"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_can_be_followed(tmp_path: Path) -> None:
    furnish(tmp_path)
    (block,) = blocks(PAGE, "sh")
    install, run, show = block.text.strip().splitlines()
    assert install.startswith("pip install")
    run_block(Block(PAGE, block.line, "sh", run), tmp_path)
    folder = tmp_path / show.rpartition("--logdir ")[2]
    found = {path.name.partition("-")[0]: EventAccumulator(str(path)).Reload() for path in folder.iterdir()}
    assert {"meta_train", "classifier", "diffusion", "pixel_classifier"} == found.keys()
    for events in found.values():
        assert [each.step for each in events.Scalars("loss")] == [20]
