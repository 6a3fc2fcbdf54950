"""A TCP relay before a real server that disturbs chosen requests, as a bad network does."""

import socket
import threading
from contextlib import suppress

BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Relay:
    """Listens on 127.0.0.1:port. `faults`: (method, kind), each for the next request of that method, kinds are

    "busy"     503, the server never sees the request
    "cut"      the connection ends before the server sees the request
    "deaf"     the server does what was asked, and its answer never arrives
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self.faults: list[tuple[bytes, str]] = []
        self.requests: list[bytes] = []
        self.bucket = ""  # that the test made through it
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Pass requests on to the server, unless a fault is due; bytes without a method belong to a body."""
        deaf = threading.Event()
        with client, socket.create_connection(self._server) as server, suppress(OSError):
            threading.Thread(target=self._answer, args=(server, client, deaf), daemon=True).start()
            while data := client.recv(1 << 16):
                method = data.partition(b" ")[0]
                if method in (b"GET", b"PUT", b"HEAD", b"POST", b"DELETE"):
                    self.requests.append(method)
                    kind = self._fault(method)
                    if kind == "busy":
                        client.sendall(BUSY)
                    if kind in ("busy", "cut"):
                        return
                    if kind == "deaf":
                        deaf.set()
                server.sendall(data)

    def _fault(self, method: bytes) -> str:
        for fault in self.faults:
            if fault[0] == method:
                self.faults.remove(fault)
                return fault[1]
        return ""

    def _answer(self, server: socket.socket, client: socket.socket, deaf: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                if deaf.is_set():  # but for "go on", which may come together with the answer
                    head, end, answer = data.partition(b"\r\n\r\n")
                    goes_on = head.startswith(b"HTTP/1.1 100")
                    client.sendall(head + end if goes_on else b"")
                    if answer or not goes_on:
                        break
                    continue
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
