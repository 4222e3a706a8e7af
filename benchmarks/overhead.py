"""`python -m benchmarks.overhead`: what HTTP, queue, encoding and storage add to the engine's compute for one image.

One caller, one image a request, on the shipped base: the caller's wall clock less the reply's `compute_ms`, which runs
from a request's first step to its decoded picture. Embedded, and on PostgreSQL, Valkey and SeaweedFS; one request after
the other, and again after pauses in which the device worker has gone back to its queue. Few steps, for what is measured
does not depend on them.
"""

import argparse
import base64
import io
import statistics
import time
from collections.abc import Mapping

import httpx
import numpy as np
from PIL import Image

from benchmarks import measure
from benchmarks.stack import Kind, service
from core.settings import PACKAGED_BASE

SEED = 0
KINDS: tuple[Kind, ...] = ("embedded", "stack")
STEPS = 4
WARM_UP = 5
PAUSE_SECONDS = 1.5  # longer than a worker lingers


def added_ms(client: httpx.Client, number: int, form: str) -> float:
    body = {"model": PACKAGED_BASE.name, "prompt": "", "seed": SEED + number, "steps": STEPS, "response_format": form}
    began = time.perf_counter()
    reply = client.post("/v1/images/generations", json=body)
    spent = 1000 * (time.perf_counter() - began)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    if form == "b64_json":
        Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).verify()
    return spent - answer["stats"]["compute_ms"]


def spread(values: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(statistics.median(values), 2),
        "p90_ms": round(float(np.percentile(values, 90)), 2),
        "p99_ms": round(float(np.percentile(values, 99)), 2),
        "count": len(values),
    }


def measured(kind: Kind, requests: int, paused: int) -> Mapping[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    with service(kind) as running, running.client() as client:
        for number in range(WARM_UP):
            added_ms(client, number, "b64_json")
        found["b64_json"] = spread([added_ms(client, number, "b64_json") for number in range(requests)])
        found["url"] = spread([added_ms(client, number, "url") for number in range(requests)])
        values: list[float] = []
        for number in range(paused):
            time.sleep(PAUSE_SECONDS)
            values.append(added_ms(client, number, "b64_json"))
        found["after a pause"] = spread(values)
    for name, row in found.items():
        print(f"{kind:9} {name:14} p50 {row['p50_ms']:7.2f} ms  p90 {row['p90_ms']:7.2f} ms", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 requests a row; keep nothing")
    parser.add_argument("--keep", action="store_true", help="with --quick: keep the result nevertheless")
    parser.add_argument("--requests", type=int, help="default: 300")
    args = parser.parse_args()

    requests = args.requests or (50 if args.quick else 300)
    found = {kind: measured(kind, requests, max(5, requests // 10)) for kind in KINDS}
    keys = {f"{kind}_p50_ms": rows["b64_json"]["p50_ms"] for kind, rows in found.items()}
    measure.record("overhead", {**keys, "sides": found, "steps": STEPS}, SEED, args.keep or not args.quick)


if __name__ == "__main__":
    main()
