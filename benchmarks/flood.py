"""A process: the fastest publisher that we can write, so that consumers are what is measured.

Why not a client library: none is fast enough to fill the faster contestants. All commands are
encoded before the start; then blocks of them go to a raw socket, back to back, with the replies
turned off. It stops only for the pacing that `meter` describes, and says for how long it did.

    python -m benchmarks.flood PORT WIRE MESSAGES BOARD     ("ready" on stdout, a line on stdin: go)
"""

import json
import socket
import sys
from pathlib import Path
from time import perf_counter, sleep

from .meter import STALL, WINDOW, Board
from .workload import BLOCK, blocks

NAP = 0.0003  # while the window is full; a contestant at 500,000/s empties it in 16 ms


def flood(port: int, wire: str, messages: int, board: Board) -> dict[str, float]:
    commands = blocks(wire, messages)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"CLIENT REPLY OFF\r\n")
        print("ready", flush=True)
        sys.stdin.readline()
        begin = perf_counter()
        sent, waited = 0, 0.0
        for block in commands:
            seen, napping = board.read(), perf_counter()
            while sent + BLOCK - seen > WINDOW:
                if perf_counter() - napping > 2 * STALL:
                    return {"sent": sent, "seconds": perf_counter() - begin, "waited": waited}
                sleep(NAP)
                seen = board.read()
            waited += perf_counter() - napping
            connection.sendall(block)
            sent += BLOCK
    return {"sent": sent, "seconds": perf_counter() - begin, "waited": waited}


if __name__ == "__main__":
    port, wire, messages, path = sys.argv[1:]
    print(json.dumps(flood(int(port), wire, int(messages), Board(Path(path)))))
