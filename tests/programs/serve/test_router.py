"""The router alone: requests before the model is loaded, and after the end."""

import asyncio

import pytest

from dist_lab.inference.line import as_line
from dist_lab.programs.serve.refused import Refused
from dist_lab.programs.serve.router import Asked, Router

STEP = {"accepted": {}, "refused": {}, "events": [], "counts": {"running": 0}}


def refusal_of(router):
    with pytest.raises(Refused) as refused:
        router.open([Asked("a", 1)])
    return refused.value.status, refused.value.message


async def life(path):
    """What a client is told before rank 0 is there, with it, and after the end."""
    router = Router(9)
    server = await asyncio.start_unix_server(router.connected, path)
    told = [refusal_of(router)]
    reader, rank_0 = await asyncio.open_unix_connection(path)
    rank_0.write(as_line(STEP))
    await router.ready
    other, to_other = await asyncio.open_unix_connection(path)
    assert await other.read() == b""  # nobody else may be rank 0
    to_other.close()
    await to_other.wait_closed()
    texts = router.open([Asked("a", 1)])
    assert b'"do":"add"' in await reader.readline()
    router.end(Refused(503, "stopping"), 5)
    told.append(refusal_of(router))
    rank_0.write(as_line(STEP | {"accepted": {"1": [1]}, "events": [["1.0", "b", "length"]]}))
    assert await texts.accepted == [1]
    assert [part.text async for part in texts] == ["b"]
    await asyncio.wait_for(router.drained(), 5)
    rank_0.close()
    await rank_0.wait_closed()
    await router.stop_ranks()
    server.close()
    return told, router.cut


def test_before_the_model_is_loaded_and_after_the_end_requests_are_refused(tmp_path):
    told, cut = asyncio.run(life(str(tmp_path / "r")))
    loading, stopping = told
    assert loading == (503, "the model is still loading; ask again in a few seconds")
    assert stopping == (503, "stopping")
    assert cut == 0
