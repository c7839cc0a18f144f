"""The parser of frames, compared with that of websockets."""

import asyncio

import numpy as np
import pytest
import uvicorn
from uvicorn.server import ServerState
from websockets.frames import Opcode, apply_mask
from websockets.protocol import State
from websockets.server import ServerProtocol

from cellstack.serve import clients, websocket

FIRST = [0.2, 0.14, 0.1, 0.1, 0.12, 0.14, 0.05, 0.05, 0.04, 0.02, 0.02, 0.02]


def by_websockets(pieces):
    """Return the messages, the pongs and the code with which the server closes."""
    protocol = ServerProtocol(state=State.OPEN, max_size=100_000)
    parts, found = [], []
    for piece in pieces:
        if protocol.parser_exc is None and protocol.close_rcvd is None:
            protocol.receive_data(piece)
    for frame in protocol.events_received():
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            text = frame.opcode == Opcode.TEXT
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            parts.append(bytes(frame.data))
            if frame.fin:
                message, parts = b"".join(parts), []
                try:
                    found.append(message.decode() if text else message)
                except UnicodeDecodeError:  # websockets leaves this to its user
                    return found, 1007
    return found, protocol.close_sent and protocol.close_sent.code


def by_cellstack(pieces):
    """Return the same."""
    found = []

    class Transport(asyncio.Transport):
        closing = False

        def write(self, data):
            pass

        def is_closing(self):
            return self.closing

        def close(self):
            self.closing = True

        def pause_reading(self):
            pass

        resume_reading = pause_reading

    class Received:
        def received(self, message):
            found.append(message)

        def count(self, frames):
            pass

    async def parse():
        state = ServerState()
        state.connections = set()
        config = uvicorn.Config(None, interface="asgi3", ws_max_size=100_000, ws_per_message_deflate=False)
        config.loaded, config.loaded_app = True, None
        parser = websocket.WebSocket(config, state, {})
        parser.clients, parser.connection = clients.Clients(1), Received()
        parser.transport, parser.handshake_complete, parser.conn.state = Transport(), True, State.OPEN
        for piece in pieces:
            if not parser.transport.is_closing():
                parser.data_received(piece)
        return parser.conn.close_sent and parser.conn.close_sent.code

    code = asyncio.run(parse())
    return found, code


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_frames_are_understood_as_by_websockets(seed):
    """Random frames, in pieces: the same messages, answers, and codes of errors."""
    draw = np.random.default_rng(seed)
    for _ in range(300):
        data = b""
        for _ in range(draw.integers(1, 8)):
            first = draw.choice([0x82, 0x81, 0x02, 0x01, 0x80, 0x00, 0x89, 0x8A, 0x88, 0x09, 0x83, 0xC2], p=FIRST)
            length = int(draw.choice([0, 1, 2, 125, 126, 127, 70_000], p=[0.3, 0.2, 0.3, 0.05, 0.05, 0.05, 0.05]))
            length = min(length, 127) if first & 8 else length  # websockets checks the other limit of these first
            payload = draw.choice([b"a", "é".encode(), b"\x03\xe8", b"\xff"], p=[0.5, 0.2, 0.25, 0.05]) * length
            payload, key = payload[:length], draw.bytes(4)
            size = {126: 126, 127: 126, 70_000: 127}.get(length, length)
            head = bytes([first, 0x80 * (draw.random() < 0.99) + size])
            head += length.to_bytes({126: 2, 127: 8}.get(size, 0), "big") if size > 125 else b""
            data += head + key + apply_mask(payload, key)
        cuts = sorted(draw.integers(0, len(data), draw.integers(0, 4)))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert by_cellstack(pieces) == by_websockets(pieces)
