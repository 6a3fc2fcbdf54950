"""`functa notify`: emit the event that images arrived, on which the deployment re-encode runs."""

import asyncio
from pathlib import Path

from functa.flows.ledger import MissingInput
from functa.flows.server.api import OperateError, absolute, prepare_environment, using
from functa.flows.server.deployed import find_api
from functa.storage.errors import one_line
from functa.storage.places.address import open_location
from functa.storage.runs.stage_records import read_record

EVENT = "functa.images.arrived"

DEPLOYMENT = "re-encode/re-encode"


def notify(root: str, images: str) -> str:
    """Emit the event and return the address of the server that took it.

    Raises MissingInput where the root has no functaset of these images, OperateError where no server answers or it has
    no deployment for the event.
    """
    root, images = absolute(root), absolute(images)
    prepare_environment()
    from functa.flows.re_encode import check_source, config_to_repeat

    config = config_to_repeat(root, read_record(open_location(root), "encode"))
    check_source(root, config.images, images)
    if Path(images).is_file():
        raise MissingInput(f"{images}: is a file; name the folder that it came to")
    if "://" not in images and not open_location(images).entries():
        raise MissingInput(f"{images}: is empty or missing; name the folder to which images came")
    api = find_api()
    with using(api):
        _check_deployment(api)
        asyncio.run(_emit(api, root, images))
    return api


def _check_deployment(api: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            raise OperateError(
                f"{api} has no deployment '{DEPLOYMENT}' to act on the event: create it with "
                "`python -m functa.deploy.bootstrap` (`functa up` does)"
            ) from None


async def _emit(api: str, root: str, images: str) -> None:
    from prefect.events import Event
    from prefect.events.clients import PrefectEventsClient
    from prefect.events.schemas.events import Resource

    resource = Resource({"prefect.resource.id": f"functa.root.{root}", "prefect.resource.name": root})
    try:
        async with PrefectEventsClient(api, reconnection_attempts=3) as client:
            await client.emit(Event(event=EVENT, resource=resource, payload={"root": root, "images": images}))
    except Exception as error:  # websockets and httpx have many
        raise OperateError(f"{api} did not take the event: {one_line(error)}") from None
