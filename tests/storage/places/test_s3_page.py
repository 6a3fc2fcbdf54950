"""Every command of docs/how-to/s3.md, run as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import botocore.session

PROJECT = Path(__file__).parents[3]
VENV = Path(sys.prefix)


def test_the_commands_of_the_page_do_what_it_describes(bucket: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (PROJECT / "docs" / "how-to" / "s3.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / ".venv").symlink_to(VENV)
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e", "-c", block], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PROJECT), "COLUMNS": "200"},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        output = done.stdout + done.stderr
        if "doctor" in block:  # its status is that of the whole machine
            assert "s3://functa-docs/runs can be written to" in output
        else:
            assert done.returncode == 0, output
    client = botocore.session.get_session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    (rule,) = client.get_bucket_lifecycle_configuration(Bucket="functa-docs")["Rules"]
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 2
    assert not client.list_multipart_uploads(Bucket="functa-docs").get("Uploads")
    client.delete_bucket(Bucket="functa-docs")
