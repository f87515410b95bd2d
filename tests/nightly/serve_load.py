"""Many clients at once, each with a stream, for a while: is every text whole, and all memory free?

    python tests/nightly/serve_load.py --clients 50 --seconds 60 [--checkpoint RUN] [--nproc 2]

Starts launch/serve.py, by default with a small model that it trains for two steps. Each client asks
for one text after another, of random length, and a fifth of them leave in the middle of it. Prints
a JSON line: texts, lost ones, tokens per second, time to the first token, blocks in use at the end.
The exit status is 1 if a text was lost, a block is not free, or the server did not end with 0.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
TRAIN = "--model gpt --layers 4 --steps 2 --batch 4 --seq 64 --val-every 0 --save-every 2".split()
LEAVES = 5  # one client in so many leaves early
AT = re.compile(r"http://127\.0\.0\.1:(\d+)")


@dataclass
class Seen:
    """What all clients have seen together."""

    texts: int = 0
    left: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first token
    lost: list[str] = field(default_factory=list)  # why


async def client(port: int, number: int, until: float, seen: Seen) -> None:
    draw = random.Random(number)
    while time.monotonic() < until:
        tokens = draw.randint(8, 96)
        leaves_after = draw.randrange(tokens) if number % LEAVES == 0 else None
        prompt = "".join(draw.choices("abcdef (),:\n", k=draw.randint(1, 200)))
        try:
            await one_text(port, prompt, tokens, leaves_after, seen)
        except (OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
            seen.lost.append(f"client {number}: {type(error).__name__}: {error}"[:300])


async def one_text(
    port: int, prompt: str, tokens: int, leaves_after: int | None, seen: Seen
) -> None:
    body = json.dumps({
        "prompt": prompt, "max_tokens": tokens, "stream": True,
        "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start, parts, usage, first = time.monotonic(), 0, None, None
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise ValueError(head.split(b"\r\n")[0].decode())
        while (line := await asyncio.wait_for(reader.readline(), 60)) != b"data: [DONE]\n":
            if not line:
                raise ValueError(f"the stream ended after {parts} parts")
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            usage = event.get("usage") or usage
            parts += bool(event["choices"])
            first = first or time.monotonic() - start
            if leaves_after is not None and parts > leaves_after:
                seen.left += 1
                return
        if usage is None or usage["completion_tokens"] != tokens:
            raise ValueError(f"{usage} of {tokens} tokens")
        seen.texts += 1
        seen.tokens += tokens
        seen.first.append(first or 0.0)
    finally:
        writer.close()


async def load(port: int, clients: int, seconds: float) -> Seen:
    seen, until = Seen(), time.monotonic() + seconds
    await asyncio.gather(*(client(port, number, until, seen) for number in range(clients)))
    return seen


def metric(port: int, name: str) -> float:
    lines = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"dist_lab_{name} ")).split()[1])


def trained(folder: Path) -> Path:
    command = [sys.executable, "launch/train.py", *TRAIN, "--out", str(folder / "run")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--policy", default="vllm")
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or trained(Path(folder))
        server = subprocess.Popen(
            [sys.executable, "launch/serve.py", "--checkpoint", str(checkpoint.resolve()),
             "--port", "0", "--nproc", str(options.nproc), "--policy", options.policy],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            found = AT.search(line := server.stderr.readline())
            assert found, line
            port = int(found[1])
            start = time.monotonic()
            seen = asyncio.run(load(port, options.clients, options.seconds))
            wall = time.monotonic() - start
            time.sleep(1.5)  # the last who left
            left = {name: metric(port, name) for name in ("blocks_used", "open_texts")}
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(60)
    times = sorted(seen.first) or [0.0]
    result = {
        "clients": options.clients, "seconds": round(wall, 1), "ranks": options.nproc,
        "policy": options.policy, "texts": seen.texts, "left_early": seen.left,
        "lost": len(seen.lost), "tokens_per_s": round(seen.tokens / wall, 1),
        "first_token_ms_median": round(1000 * statistics.median(times)),
        "first_token_ms_p95": round(1000 * times[int(0.95 * (len(times) - 1))]),
        "blocks_used_at_end": left["blocks_used"], "open_texts_at_end": left["open_texts"],
        "exit_status": status,
    }  # fmt: skip
    print(json.dumps(result))
    print(*seen.lost[:10], sep="\n", file=sys.stderr)
    return int(bool(seen.lost or any(left.values()) or status))


if __name__ == "__main__":
    sys.exit(main())
