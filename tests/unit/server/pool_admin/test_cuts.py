"""Other sizes of a pool: what they keep, and how one is defined."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from emo_serve.errors import EmoServeError, RequestError
from emo_serve.pools.document import parse_pool
from emo_serve.server.asgi.errors import status_of
from emo_serve.server.pool_admin.api import create_router
from emo_serve.server.pool_admin.cuts import cuts_of
from tests.support.fake_engine import SLOT_BYTES
from tests.support.pool_services import MOE_LAYERS, POOLS, service_of

SCORES = [0.4, 0.3, 0.1, 0.1, 0.05, 0.05, 0, 1.0]  # expert 7 is shared
OTHERS = [0, 0, 0, 0, 0, 0, 1.0, 1.0]
SCORED = {
    "format": "emo-pool/1",
    "name": "scored",
    "layers": [None, {"experts": [0, 1], "scores": SCORES}, {"experts": [6], "scores": OTHERS}],
}


def test_a_size_keeps_the_best_scores_of_each_layer() -> None:
    cuts = cuts_of(parse_pool("test", SCORED).complete(MOE_LAYERS), MOE_LAYERS, SLOT_BYTES)
    assert [cut.experts for cut in cuts] == list(range(1, 9))
    shares = [0.0, (0.4 + 1) / 2, (0.7 + 1) / 2, 0.9, 0.95, 0.975, 1.0, 1.0]
    assert [cut.share for cut in cuts] == pytest.approx(shares)
    assert [cut.bytes for cut in cuts] == [2 * k * SLOT_BYTES for k in range(1, 9)]


def test_a_pool_without_scores_has_no_other_size() -> None:
    with pytest.raises(RequestError, match="'math' has no scores"):
        cuts_of(POOLS[0], MOE_LAYERS, SLOT_BYTES)


async def test_the_routes_show_sizes_and_define_one() -> None:
    def to_http_error(error: EmoServeError) -> Exception:
        return HTTPException(status_of(error), str(error))

    service, app = service_of(), FastAPI()
    app.include_router(create_router(service, to_http_error))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post("/v1/pools", json=SCORED)
        cuts = (await client.get("/v1/pools/scored/cuts")).json()
        assert (cuts["name"], cuts["data"][1]["share"]) == ("scored", pytest.approx(0.7))
        made = await client.post("/v1/pools/scored/cut", json={"name": "small", "experts": 2})
        assert (made.status_code, made.json()["experts_per_layer"]) == (201, [0, 2, 2])
        small = (await client.get("/v1/pools/small")).json()
        assert small["experts"] == [[], [0, 7], [6, 7]]
        assert small["bytes"] == cuts["data"][1]["bytes"]
        for body, words in (
            ({"name": "other", "experts": 0}, "cannot cut"),
            ({"name": "other"}, "experts"),
            ({"name": "Other", "experts": 2}, "name"),
            (None, "body"),
        ):
            refused = await client.post("/v1/pools/scored/cut", json=body)
            assert refused.status_code == 400, body
            assert words in refused.json()["detail"]
        again = await client.post("/v1/pools/scored/cut", json={"name": "small", "experts": 3})
        assert again.status_code == 409
        for path in ("math/cuts", "base/cuts", "math+code/cuts"):
            assert (await client.get(f"/v1/pools/{path}")).status_code == 400, path
