"""`functa export` and `functa fetch`: publish a root or a functaset, and open what others published."""

from typing import Annotated

from cyclopts import Parameter

from functa.flows.cli.progress import ProgressLine
from functa.flows.server.console import print_line
from functa.storage.publish.manifest import Layout

KINDS = {"root": "a root", "functaset": "a functaset", "photographs": "a store of photographs", "latents": "latents"}


def export(
    source: Annotated[str, Parameter(help="A run's root, a functaset, or a store of photographs.")],
    *,
    to: Annotated[
        str, Parameter(help="A folder or s3://; of the hub hf://USER/NAME, or hf://datasets/USER/NAME for data alone.")
    ],
    layout: Annotated[
        Layout | None,
        Parameter(name="--format", help="Latents alone, for readers that know neither Zarr nor functa."),
    ] = None,
    licence: Annotated[str | None, Parameter(help="SPDX identifier for the cards, such as CC-BY-4.0.")] = None,
    private: Annotated[bool, Parameter(help="A new repository of the hub is private.", negative="")] = False,
    replace: Annotated[
        bool, Parameter(help="Put a new revision over an export in the repository.", negative="")
    ] = False,
) -> int:
    """Publish a root or a functaset: models, latents, model card, data card and digests. Rerun to continue.

    What is exported opens like a root or a functaset. Every object is checked before anything is written.
    """
    from functa.tasks.report.publish.export import Request
    from functa.tasks.report.publish.export import export as write

    with ProgressLine("exporting", "files") as show:
        done = write(Request(source, to, licence, private, replace, layout), show)
    print_line(f"{done.address}: {KINDS[done.kind]}, {done.files} files of {done.bytes / 1e6:.1f} MB; "
               f"functa fetch {done.address} --to FOLDER copies it")  # fmt: skip
    return 0


def fetch(
    address: Annotated[str, Parameter(help="hf://USER/NAME, with @REVISION if you like; or an exported folder.")],
    *,
    to: Annotated[str, Parameter(help="Where the copy goes: an empty folder or s3://.")],
) -> int:
    """Copy a published root or functaset; the digest of every file is checked. Rerun to continue."""
    from functa.storage.publish.fetch import fetch as copy

    with ProgressLine("fetching", "files") as show:
        manifest = copy(address, to, show)
    what = f"{KINDS[manifest.kind]}, {len(manifest.files)} files of {manifest.size / 1e6:.1f} MB, digests checked"
    print_line(f"{to}: {what}; licence {manifest.licence}")
    return 0
